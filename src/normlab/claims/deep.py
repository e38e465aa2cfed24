"""Deep perceptrons as they are before training, and the gradients that flow through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from normlab.claims.charts import lines
from normlab.claims.material import NO_EPS, images
from normlab.layers import BatchNorm1d
from normlab.streams import stream

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = [
    "DEPTH",
    "FITTED",
    "SQUARED",
    "WIDTH",
    "Hidden",
    "gradients",
    "growth",
    "growth_chart",
    "hidden",
    "relative",
    "weights",
]

WIDTH, DEPTH = 1000, 40
FITTED = (10, 30)
"""The layers that growth is fitted over: below them the images are still felt, and above the
loss."""
SQUARED = "‖∂L/∂h‖²"


class Hidden(NamedTuple):
    """What the layers of a perceptron compute.

    Attributes:
        before: h of each layer, the product with its weights: what its norm gets; shape (N, width).
        after: What each layer puts out, shape (N, width).
    """

    before: list[Tensor]
    after: list[Tensor]


def weights(seed: int, width: int, depth: int, gain: float) -> list[Tensor]:
    """Draw the weights of a perceptron on images of 784 pixels, Gaussian, of variance gain/fan_in.

    Args:
        seed: Of the draw.
        width: Of each layer.
        depth: How many layers.
        gain: 2 keeps a ReLU network's values at their size (He), 1 a linear one's.

    Returns:
        float32, the first of shape (width, 784) and the others (width, width).
    """
    generator = stream(seed, "claims", "weights")
    sizes = [784] + [width] * (depth - 1)
    return [
        torch.randn(width, size, generator=generator) * math.sqrt(gain / size) for size in sizes
    ]


def hidden(x: Tensor, weights: Sequence[Tensor], *, norm: bool, relu: bool) -> Hidden:
    """Send images through layers of weights, batch norm and ReLU, each of the last two if wanted.

    Args:
        x: Shape (N, 784).
        weights: Of each layer.
        norm: Whether each layer has a batch norm, without γ and β, and ε = 1e-30.
        relu: Whether each layer ends in a ReLU.
    """
    before, after = [], []
    for weight in weights:
        x = F.linear(x, weight)
        before.append(x)
        if norm:
            x = BatchNorm1d(len(weight), NO_EPS, affine=False, track_running_stats=False)(x)
        if relu:
            x = F.relu(x)
        after.append(x)
    return Hidden(before, after)


def gradients(
    seed: int, count: int, weights: Sequence[Tensor], *, norm: bool, relu: bool
) -> list[float]:
    """Return ‖∂L/∂h‖² of each layer, L the cross-entropy of a random linear readout on ten classes.

    Args:
        seed: Of the images and of the readout.
        count: Of images, in one batch.
        weights: Of each layer; their dtype is computed in.
        norm: As for `hidden`.
        relu: As for `hidden`.
    """
    x, labels = images(seed, count)
    x = x.flatten(1).to(weights[0].dtype).requires_grad_()
    layers = hidden(x, weights, norm=norm, relu=relu)
    last = layers.after[-1]
    readout = torch.randn(10, last.shape[1], generator=stream(seed, "claims", "readout"))
    loss = F.cross_entropy(F.linear(last, readout.to(last.dtype) / last.shape[1] ** 0.5), labels)
    found = torch.autograd.grad(loss, layers.before)
    return [float(each.double().square().sum()) for each in found]


def growth(frame: pd.DataFrame, arm: str) -> list[float]:
    """Return by how much ‖∂L/∂h‖² grows from a layer to the one before it, a number a seed.

    It is e to the slope of a line through the logarithms, fitted by least squares over the layers
    of `FITTED`.

    Args:
        frame: Columns `seed`, `arm`, `quantity`, `at` (the layer, counted from 1) and `value`.
        arm: Whose.
    """
    import numpy as np

    low, high = FITTED
    chosen = frame[(frame["arm"] == arm) & frame["at"].between(low, high)]
    return [
        float(np.exp(-np.polyfit(rows["at"], np.log(rows["value"]), 1)[0]))
        for _, rows in chosen.groupby("seed", sort=True)
    ]


def relative(frame: pd.DataFrame, expected: Mapping[str, float]) -> dict[str, list[float]]:
    """Return growth / expected − 1 of each arm, a number a seed.

    Args:
        frame: As for `growth`.
        expected: By arm.
    """
    return {
        arm: [value / wanted - 1 for value in growth(frame, arm)]
        for arm, wanted in expected.items()
    }


def growth_chart(
    frame: pd.DataFrame, expected: Mapping[str, float], title: str
) -> alt.TopLevelMixin:
    """Draw ‖∂L/∂h‖² by layer, relative to that of the last of `FITTED`, beside what theory says.

    Args:
        frame: As for `growth`.
        expected: Growth by arm; the first is grey.
        title: What is shown.
    """
    import altair as alt
    import pandas as pd

    low, high = FITTED
    scaled = frame.merge(
        frame.loc[frame["at"] == high, ["seed", "arm", "value"]],
        on=["seed", "arm"],
        suffixes=("", "_there"),
    )
    scaled["value"] /= scaled["value_there"]
    drawn = lines(
        scaled,
        title=title,
        x="layer",
        y=f"{SQUARED} (layer {high}: 1)",
        arms=list(expected),
        log_y=True,
    )
    slopes = [
        {"arm": arm, "at": at, "value": each ** (high - at)}
        for arm, each in expected.items()
        for at in (low, high)
    ]
    theory = (
        alt.Chart(pd.DataFrame(slopes))
        .mark_line(color="black", strokeDash=[3, 3], strokeWidth=1.2)
        .encode(x="at:Q", y="value:Q", detail="arm:N")
    )
    return alt.layer(drawn, theory)
