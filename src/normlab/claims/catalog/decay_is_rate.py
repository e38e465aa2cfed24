"""Before batch norm weight decay is a learning rate by another name.

A network whose weights w feed batch norm computes the same for αw, and ∇(αw) = ∇(w)/α. A step of
SGD from αw at the rate α²η with decay λ/α² therefore ends at α times where a step from w at η with
λ ends (van Laarhoven, 2017). And with c = 1 − ηλ, the step w ← c·w − η∇(w) is, for v = w/cᵗ, the
step v ← v − η/c²ᵗ⁺¹ · ∇(v), which has no decay, and a rate that grows (Li and Arora, 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import of_arm
from normlab.claims.material import NO_EPS, apart, images, network
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "trajectory"]

_NETWORK, _BATCH = "mlp:128,128,128,128", 128
_RATE, _DECAY, _SCALE = 0.1, 0.01, 10.0
_STEPS, _QUICK = 200, 40
_APART = "difference of outputs"
_SCALED, _GROWING, _WITHOUT = "all three scaled", "growing rate", "without decay"
_PLAIN = "growing rate, no norm"
_ARMS = (_WITHOUT, _SCALED, _GROWING, _PLAIN)


def trajectory(
    arm: str,
    seed: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    rate: Callable[[int], float],
    decay: float,
    scale: float = 1.0,
) -> Iterator[Tensor]:
    """Yield what a network puts out for each batch, and train it on that batch with SGD; float64.

    Args:
        arm: `batch` or `plain`; ε is 1e-30.
        seed: Of the first weights.
        batches: Images (N, C, H, W) and labels.
        rate: Of the weights of hidden layers, by step from 0; all else is trained at 0.1.
        decay: Of the weights of hidden layers; of nothing else.
        scale: By which the first weights of hidden layers are multiplied.
    """
    model = network(_NETWORK, arm, seed, eps=NO_EPS)
    named = dict(model.named_parameters())
    feeding = {
        name for name in named if name.startswith("hidden") and name.endswith("linear.weight")
    }
    with torch.no_grad():
        for name in feeding:
            named[name].mul_(scale)
    for step, (x, labels) in enumerate(batches):
        output = model(x.double())
        gradients = torch.autograd.grad(F.cross_entropy(output, labels), list(named.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                if name in feeding:
                    weight.mul_(1 - rate(step) * decay).sub_(rate(step) * gradient)
                else:
                    weight.sub_(_RATE * gradient)
        yield output.detach()


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    steps = _QUICK if work.quick else _STEPS
    for seed in work.seeds:
        x, labels = images(seed, steps * _BATCH, "fashion-mnist")
        batches = list(zip(x.split(_BATCH), labels.split(_BATCH), strict=True))
        wanted = {
            arm: list(trajectory(arm, seed, batches, rate=_constant, decay=_DECAY))
            for arm in ("batch", "plain")
        }
        arms = {
            _WITHOUT: trajectory("batch", seed, batches, rate=_constant, decay=0.0),
            _SCALED: trajectory(
                "batch", seed, batches, rate=_larger, decay=_DECAY / _SCALE**2, scale=_SCALE
            ),
            _GROWING: trajectory("batch", seed, batches, rate=_growing, decay=0.0),
            _PLAIN: trajectory("plain", seed, batches, rate=_growing, decay=0.0),
        }
        rows = []
        for name, found in arms.items():
            beside = wanted["plain" if name == _PLAIN else "batch"]
            rows += [Row(name, _APART, t, d) for t, d in enumerate(map(apart, found, beside), 1)]
        yield seed, rows


def _constant(step: int) -> float:  # noqa: ARG001 - one of the rates
    return _RATE


def _larger(step: int) -> float:  # noqa: ARG001 - likewise
    return _SCALE**2 * _RATE


def _growing(step: int) -> float:
    return _RATE / (1 - _RATE * _DECAY) ** (2 * step + 1)


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    last = frame[frame["at"] == frame["at"].max()]
    exact = (_SCALED, _GROWING)
    return {_part(arm): of_arm(frame if arm in exact else last, arm) for arm in _ARMS}


def _part(arm: str) -> str:
    return {
        _SCALED: "(αw₀, α²η, λ/α²) beside (w₀, η, λ): largest difference",
        _GROWING: "no decay and rate η/(1−ηλ)²ᵗ⁺¹ beside decay λ: largest difference",
        _WITHOUT: "no decay beside decay λ: difference at the end",
        _PLAIN: "without batch norm, rate η/(1−ηλ)²ᵗ⁺¹ beside decay λ: difference at the end",
    }[arm]


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame,
        title="How far a network is from the one that is trained with weight decay",
        x="step",
        y="|difference| / max |output|",
        arms=list(_ARMS),
        log_y=True,
    )


CLAIM = Claim(
    name="decay-is-rate",
    statement=(
        "Decay of weights that feed batch norm does not hold back what the network can compute: it "
        "acts only through the learning rate, which is in effect η/‖w‖²."
    ),
    source="van Laarhoven, 2017; Li and Arora, 2019",
    metric=(
        "max |f₁ − f₂| / max |f₂| of the outputs in training mode on the batch of a step, f₂ the "
        "network trained with rate η and decay λ from weights w₀."
    ),
    published="An argument, and plots.",
    setup=(
        "Fashion-MNIST, a perceptron 784-128-128-128-128-10 with ReLU and batch norm before it, "
        f"ε = 1e-30, in float64; SGD in batches of {_BATCH}, η = {_RATE:g} and λ = {_DECAY:g} on "
        f"the weights of hidden layers, α = {_SCALE:g}; everything else is trained at {_RATE:g} "
        f"without decay. {_STEPS} steps; quick: {_QUICK}."
    ),
    parts=(
        # Training multiplies what roundings make different, from 1e-16 on; a millionth of the
        # largest output is still nothing that one would see.
        Part(_part(_SCALED), "exact", 1e-6),
        Part(_part(_GROWING), "exact", 1e-6),
        # Controls: 1% of the largest output is the least that is worth calling another function.
        Part(_part(_WITHOUT), "more", 0.01),
        Part(_part(_PLAIN), "more", 0.01),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
)
