"""The scale of weights that feed batch norm does not matter to what a network computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import of_arm
from normlab.claims.material import NO_EPS, apart, hidden_layers, images, network
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "answers"]

_NETWORK, _IMAGES = "mlp:128,128,128,128", 128
_SCALES = (0.01, 0.1, 1 / 3, 3.0, 10.0, 100.0)
_OUTPUT, _GRADIENT = "output", "gradient"
_ARMS: dict[str, tuple[str, float | None]] = {
    "plain": ("plain", None),
    "batch, ε → 0": ("batch", NO_EPS),
    "batch, ε = 1e-5": ("batch", None),
}
_EXACT = "batch, ε → 0"


def answers(model: nn.Sequential, scale: float, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the output of a network, and α · ∂L/∂(αw) of each of its hidden layers.

    Args:
        model: Of `network`; the weights of its hidden layers are multiplied by `scale` on the
            way, and are as they were at the end.
        scale: α.
        x: Images, shape (N, C, H, W).
        labels: Shape (N,); L is the cross-entropy.
    """
    weights = [layer.weight for layer in hidden_layers(model)]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(scale)
    output = model(x)
    gradients = torch.autograd.grad(F.cross_entropy(output, labels), weights)
    with torch.no_grad():
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
    return [output.detach(), *(scale * each for each in gradients)]


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    for seed in work.seeds:
        x, labels = images(seed, _IMAGES)
        rows = []
        for name, (arm, eps) in _ARMS.items():
            model = network(_NETWORK, arm, seed, eps=eps)
            output, *gradients = answers(model, 1.0, x.double(), labels)
            for scale in _SCALES:
                scaled, *others = answers(model, scale, x.double(), labels)
                worst = max(map(apart, others, gradients))
                rows.append(Row(name, _OUTPUT, scale, apart(scaled, output)))
                rows.append(Row(name, _GRADIENT, scale, worst))
        yield seed, rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {
        "|f(αw) − f(w)| / max |f(w)|": of_arm(frame, _EXACT, _OUTPUT),
        "|α·∇(αw) − ∇(w)| / max |∇(w)|": of_arm(frame, _EXACT, _GRADIENT),
        "without batch norm: |f(αw) − f(w)| / max |f(w)|": of_arm(frame, "plain", _OUTPUT, np.min),
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame[frame["quantity"] == _OUTPUT],
        title="How far a scaled network's output is from the unscaled one's",
        x="α, the factor of all weights that feed a norm",
        y="|f(αw) − f(w)| / max |f(w)|",
        arms=list(_ARMS),
        log_x=True,
        log_y=True,
    )


CLAIM = Claim(
    name="scale-invariance",
    statement=(
        "Multiplying the weights that feed batch norm by α > 0 leaves what the network computes as "
        "it is, and divides their gradient by α."
    ),
    source="Ioffe and Szegedy, 2015; van Laarhoven, 2017",
    metric=(
        "max |f(αw) − f(w)| / max |f(w)|, f the output in training mode, and max |α·∇(αw) − ∇(w)| "
        "/ max |∇(w)|, the worst hidden layer's; the largest over α."
    ),
    published="A formula, and no figure.",
    setup=(
        f"A perceptron 784-128-128-128-128-10 with ReLU, in float64, and a batch of {_IMAGES} "
        "images of MNIST; the weights of all hidden layers times α = 0.01, 0.1, 1/3, 3, 10 and "
        "100. With ε = 1e-30, and beside it, in the figure, with the usual 1e-5, which a small "
        "enough α makes felt. A quick run is the same."
    ),
    parts=(
        # Roundings of float64 are 1e-16; this leaves room for what five layers make of them.
        Part("|f(αw) − f(w)| / max |f(w)|", "exact", 1e-10),
        Part("|α·∇(αw) − ∇(w)| / max |∇(w)|", "exact", 1e-10),
        # A tenth of the largest output: without batch norm the scale is there to be seen.
        Part("without batch norm: |f(αw) − f(w)| / max |f(w)|", "more", 0.1),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    is_cheap=True,
)
