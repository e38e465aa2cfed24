"""Batch norm keeps what deep networks compute before training from collapsing to a direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.deep import hidden, weights
from normlab.claims.material import images
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "mean_cosine", "numerical_rank"]

_WIDTH, _DEPTH, _IMAGES = 128, 64, 128
_RANK, _COSINE = "numerical rank", "mean cosine"
_KEPT = 0.01
_ARMS = {
    "plain, linear": (False, False),
    "batch, linear": (True, False),
    "plain, ReLU": (False, True),
    "batch, ReLU": (True, True),
}


def numerical_rank(values: Tensor) -> int:
    """Return how many singular values of a matrix are above 1% of the largest.

    Args:
        values: Shape (samples, features), floating point.

    >>> numerical_rank(torch.diag(torch.tensor([100.0, 2.0, 0.5])))
    2
    """
    singular = torch.linalg.svdvals(values.double())
    return int((singular > _KEPT * singular[0]).sum())


def mean_cosine(values: Tensor) -> float:
    """Return the mean cosine of the angle between two different samples.

    A sample that is zero everywhere has a cosine of 0 with every other.

    Args:
        values: Shape (samples, features), floating point.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    0.3333333333333333
    """
    unit = torch.nn.functional.normalize(values.double())
    count = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    for seed in work.seeds:
        x, _ = images(seed, _IMAGES)
        rows = []
        for arm, (norm, relu) in _ARMS.items():
            drawn = weights(seed, _WIDTH, _DEPTH, gain=2 if relu else 1)
            # float64: at the end of a product of many matrices little is left of most directions.
            layers = hidden(
                x.flatten(1).double(), [each.double() for each in drawn], norm=norm, relu=relu
            )
            for layer, values in enumerate(layers.after, 1):
                rows.append(Row(arm, _RANK, layer, numerical_rank(values)))
                rows.append(Row(arm, _COSINE, layer, mean_cosine(values)))
        yield seed, rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    def of(quantity: str, arm: str, layer: int = _DEPTH) -> np.ndarray:
        chosen = frame["quantity"].eq(quantity) & frame["arm"].eq(arm) & frame["at"].eq(layer)
        return frame[chosen].sort_values("seed")["value"].to_numpy()

    effects = {}
    for kind in ("linear", "ReLU"):
        plain, batch = f"plain, {kind}", f"batch, {kind}"
        effects[f"{kind}: rank, batch / plain"] = np.log2(of(_RANK, batch) / of(_RANK, plain))
        effects[f"{kind}: rank with batch norm, layer {_DEPTH} / layer {_DEPTH // 2}"] = np.log2(
            of(_RANK, batch) / of(_RANK, batch, _DEPTH // 2)
        )
    effects["ReLU: cosine, plain − batch"] = of(_COSINE, "plain, ReLU") - of(_COSINE, "batch, ReLU")
    return {name: values.tolist() for name, values in effects.items()}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame[frame["quantity"] == _RANK],
        title="How many directions are left, layer by layer, before training",
        x="layer",
        y=f"{_RANK} of {_IMAGES} images",
        arms=list(_ARMS),
        log_y=True,
    )


CLAIM = Claim(
    name="rank",
    statement=(
        "Before training, what a deep network computes of different inputs collapses towards a "
        "single direction; batch norm keeps it from doing so."
    ),
    source="Daneshmand, Kohler, Bach, Hofmann and Lucchi, 2020",
    metric=(
        "Numerical rank of a layer's output (images × units): how many of its singular values are "
        f"above {_KEPT:.0%} of the largest; and the mean cosine between two images."
    ),
    published="A lower bound that grows as the root of the width, and plots.",
    setup=(
        f"Perceptrons of {_DEPTH} layers of {_WIDTH} with Gaussian weights of variance 1/fan-in "
        "(linear) or 2/fan-in (ReLU), no biases, batch norm with ε = 1e-30 before the ReLU; "
        f"{_IMAGES} images of MNIST, float64. The same weights in every arm but for their scale; "
        "a quick run is the same."
    ),
    parts=(
        # Twice the rank: less is a matter of where the threshold of 1% is put.
        Part("linear: rank, batch / plain", "more", 1.0, "doublings"),
        Part("ReLU: rank, batch / plain", "more", 1.0, "doublings"),
        # A rank that fell as 1/depth would lose a doubling from layer 32 to 64; half of that is
        # the root's.
        Part("linear: rank with batch norm, layer 64 / layer 32", "equal", 0.5, "doublings"),
        Part("ReLU: rank with batch norm, layer 64 / layer 32", "equal", 0.5, "doublings"),
        # 0.1: at a cosine of 0.9 or above images lie within 26° of one another.
        Part("ReLU: cosine, plain − batch", "more", 0.1),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "The authors say it of any depth, which 64 layers are not: where layer 64 / layer 32 lies "
        "below zero the rank still falls, if slowly. And a network without batch norm need not "
        "have come down to one direction by then: the figure shows how many are left."
    ),
    is_cheap=True,
)
