"""Without skips, batch norm makes gradients grow from layer to layer at initialization.

A batch of B values, normalized, is a point on the sphere of radius √B among the vectors of mean
zero; in a wide network its direction is uniform there once the batch's kernel has settled at equal
variances a and equal covariances b. Then, with ρ = −1/(B−1) the correlation of two coordinates and
J = (√(1−ρ²) + (π − arccos ρ)·ρ)/π the arc-cosine kernel, the next kernel has a − b = (1 − J)/2. The
gradient through batch norm is multiplied by √B/‖h − mean‖ and loses what lies along 1 and along h;
with E 1/‖h − mean‖² = 1/((a−b)(B−3)), ‖∂L/∂h‖² grows per layer by

    B/((a−b)·(B−1)·(B−3)) · [(B−2)/2 − (B/2 − 1 − (B−1)·(p + J/2))/B],  p = 1/4 + arcsin(ρ)/2π

where p is the probability that two values are both above zero. It falls to π/(π−1) as B grows. The
limit is that of Yang, Pennington, Rao, Sohl-Dickstein and Schoenholz, "A Mean Field Theory of Batch
Normalization", 2019; what it is at a finite B follows from the same argument, worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.claim import Claim, Part, Row
from normlab.claims.deep import (
    DEPTH,
    FITTED,
    SQUARED,
    WIDTH,
    gradients,
    growth_chart,
    relative,
    weights,
)
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "expected_growth"]

_LARGE, _QUICK = 1024, 256


def expected_growth(batch: int) -> float:
    """Return the growth per layer of ‖∂L/∂h‖², batch norm before ReLU, at infinite width.

    Args:
        batch: B, at least 4: below, its expectation is infinite.

    >>> round(expected_growth(8), 3), round(expected_growth(10**9), 6)
    (1.788, 1.466942)
    >>> round(math.pi / (math.pi - 1), 6)
    1.466942
    """
    size = float(batch)
    rho = -1 / (size - 1)
    kernel = (math.sqrt(1 - rho**2) + (math.pi - math.acos(rho)) * rho) / math.pi
    both = 0.25 + math.asin(rho) / (2 * math.pi)
    spread = (1 - kernel) / 2
    passed = (size - 2) / 2 - (size / 2 - 1 - (size - 1) * (both + kernel / 2)) / size
    return size / (spread * (size - 1) * (size - 3)) * passed


# The plain network has weights that keep gradients at their size.
_EXPECTED = {
    "plain": 1.0,
    **{f"batch of {size}": expected_growth(size) for size in (8, 32, 128)},
    "large batch": math.pi / (math.pi - 1),
}


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    large = _QUICK if work.quick else _LARGE
    sizes = {"plain": 128, "large batch": large, **{f"batch of {n}": n for n in (8, 32, 128)}}
    for seed in work.seeds:
        drawn = weights(seed, WIDTH, DEPTH, gain=2)
        yield (
            seed,
            [
                Row(arm, SQUARED, layer, value)
                for arm, size in sizes.items()
                for layer, value in enumerate(
                    gradients(seed, size, drawn, norm=arm != "plain", relu=True), 1
                )
            ],
        )


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    found = relative(frame, _EXPECTED)
    return {_part(arm): values for arm, values in found.items()}


def _part(arm: str) -> str:
    formula = {"plain": "1", "large batch": "(π/(π−1))"}.get(arm, "the formula's")
    return f"{arm}: growth / {formula} − 1"


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    title = "Gradients before training, layer by layer; dashed: what theory says"
    return growth_chart(frame, _EXPECTED, title)


CLAIM = Claim(
    name="gradient-explosion",
    statement=(
        "Before training, batch norm in a deep ReLU network without skip connections makes "
        "gradients grow exponentially towards the input, by π/(π − 1) a layer in large batches; "
        "without it they keep their size."
    ),
    source="Yang, Pennington, Rao, Sohl-Dickstein and Schoenholz, 2019",
    metric=(
        f"Growth per layer of {SQUARED}, h the input of a layer's norm: e to the slope of "
        f"log {SQUARED} over layers {FITTED[0]} to {FITTED[1]}."
    ),
    published="π/(π − 1) = 1.467 for large batches.",
    setup=(
        f"Perceptrons of {DEPTH} layers of {WIDTH:,} with Gaussian weights of variance 2/fan-in, "
        "no biases, batch norm with ε = 1e-30 before ReLU; images of MNIST, and the cross-entropy "
        "of a random readout. Batches of 8, 32, 128 (expected at infinite width: 1.788, 1.522, "
        f"1.480) and {_LARGE:,}; quick: {_QUICK}. The same weights in every arm."
    ),
    # 3%: what is left of theory at this width should be a small part of a growth by 47%.
    parts=tuple(Part(_part(arm), "equal", 0.03) for arm in _EXPECTED),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "This is about networks without skip connections, before their first step; it says nothing "
        "of what training makes of them, nor of networks with skips, of which identity-bias looks "
        "at what goes forward. The limit is published; what is expected of smaller batches is "
        "worked out here."
    ),
)
