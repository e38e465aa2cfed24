"""Batch norm on residual branches makes them small beside the skip, the more so the deeper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.material import images
from normlab.claims.work import Work
from normlab.layers import BatchNorm1d
from normlab.streams import stream

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "variance_ratios"]

_WIDTH, _DEPTH, _IMAGES = 512, 50, 256
_RATIO = "Var(branch) / Var(skip)"
_ARMS = {"plain": False, "batch": True}


def variance_ratios(x: Tensor, seed: int, *, width: int, depth: int, norm: bool) -> Iterator[float]:
    """Yield Var(branch)/Var(skip) of each block of a pre-activation residual perceptron.

    A block adds to its input W₂·ReLU(BN(W₁·ReLU(BN(input)))). The network's first layer is a linear
    one, whose output is scaled to a variance of 1.

    Args:
        x: Images, shape (N, pixels).
        seed: Of the weights, which are Gaussian with variance 2/fan-in.
        width: Of every layer.
        depth: How many blocks.
        norm: Whether there are the two batch norms.
    """
    generator = stream(seed, "claims", "residual")

    def draw(fan_in: int) -> Tensor:
        drawn = torch.randn(width, fan_in, generator=generator) * math.sqrt(2 / fan_in)
        return drawn.to(x.dtype)

    def half(values: Tensor) -> Tensor:
        normal = BatchNorm1d(width, dtype=x.dtype)(values) if norm else values
        return F.linear(F.relu(normal), draw(width))

    skip = F.linear(x, draw(x.shape[1]))
    skip = skip / skip.std(correction=0)
    with torch.no_grad():
        for _ in range(depth):
            branch = half(half(skip))
            yield float(branch.var(correction=0) / skip.var(correction=0))
            skip = skip + branch


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    for seed in work.seeds:
        x, _ = images(seed, _IMAGES)
        yield (
            seed,
            [
                Row(arm, _RATIO, block, ratio)
                for arm, norm in _ARMS.items()
                for block, ratio in enumerate(
                    variance_ratios(x.flatten(1), seed, width=_WIDTH, depth=_DEPTH, norm=norm), 1
                )
            ],
        )


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    batch = frame[frame["arm"] == "batch"]
    times = (batch["value"] * batch["at"]).groupby(batch["seed"]).mean()
    plain = frame[frame["arm"] == "plain"].groupby("seed")["value"].mean()
    return {_PARTS[0]: (times - 1).tolist(), _PARTS[1]: (plain - 1).tolist()}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import altair as alt
    import pandas as pd

    drawn = lines(
        frame,
        title="Residual branches beside the skip, before training; dashed: 1/l",
        x="block l",
        y=_RATIO,
        arms=list(_ARMS),
        log_x=True,
        log_y=True,
    )
    theory = alt.Chart(pd.DataFrame([{"at": at, "value": 1 / at} for at in (1, _DEPTH)]))
    dashes = theory.mark_line(color="black", strokeDash=[3, 3], strokeWidth=1.2)
    return alt.layer(drawn, dashes.encode(x="at:Q", y="value:Q"))


_PARTS = (
    f"batch: mean over blocks of l · {_RATIO} − 1",
    f"plain: mean over blocks of {_RATIO} − 1",
)

CLAIM = Claim(
    name="identity-bias",
    statement=(
        "Before training, batch norm on the branches of a residual network makes the branch of "
        "block l contribute about 1/l of the skip's variance, so that deep blocks are near the "
        "identity; without it, branch and skip contribute alike."
    ),
    source="De and Smith, 2020",
    metric=f"l · {_RATIO} at block l, over all images and units, mean over blocks 1 to {_DEPTH}.",
    published="1/l, from an argument on variances, and plots.",
    setup=(
        f"A residual perceptron of {_DEPTH} blocks of width {_WIDTH}, BN-ReLU-linear twice in each "
        "branch, Gaussian weights of variance 2/fan-in, no biases, the first skip scaled to "
        f"variance 1; {_IMAGES} images of MNIST. The same weights in both arms; a quick run is the "
        "same."
    ),
    # 3%: less than what tells 1/l from 1/(l+1), averaged over the blocks.
    parts=(Part(_PARTS[0], "equal", 0.03), Part(_PARTS[1], "equal", 0.03)),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    is_cheap=True,
)
