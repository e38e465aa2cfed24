"""In evaluation mode batch norm's answer to a sample does not depend on the rest of its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from normlab.claims.charts import dots
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import of_arm
from normlab.claims.material import apart, images, network
from normlab.claims.work import Work
from normlab.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normlab.streams import stream

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "companies", "dependence"]

_APART = "max |difference| / max |output|"
_TYPES = {"float32": torch.float32, "float64": torch.float64}
_SHAPES = {"(N, C)": (), "(N, C, L)": (9,), "(N, C, H, W)": (5, 7), "(N, C, D, H, W)": (3, 2, 5)}
_CHANNELS, _COMPANY = 16, 7
_LAYERS = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_MEMORY: tuple[dict[str, torch.memory_format], ...] = (
    {"": torch.contiguous_format},
    {"": torch.contiguous_format},
    {"": torch.contiguous_format, " channels last": torch.channels_last},
    {"": torch.contiguous_format, " channels last": torch.channels_last_3d},
)
_NETWORKS = (
    *(("mlp:128,128", arm) for arm in ("batch", "batch@post", "batch@input", "torch-batch")),
    *(("lenet", arm) for arm in ("batch", "torch-batch")),
    ("resnet18", "batch"),
)
_EXACT = [f"{what}, {dtype}" for what in ("layers", "networks") for dtype in _TYPES]
_TRAINING = "networks, in training mode"
_ZERO = 1e-18  # Where the figure's logarithmic axis has what is equal to the last bit.


def companies(x: Tensor, other: Tensor) -> list[Tensor]:
    """Return batches that begin with the same sample: more, fewer, far and broken ones beside it.

    Args:
        x: The sample and what it is usually with, shape (N, …).
        other: As many others.
    """
    sample, rest = x[:1], x[1:]
    batches = [rest, rest[:1], other, 1000 * other, torch.full_like(rest, torch.nan)]
    return [torch.cat([sample, each]) for each in batches]


def dependence(
    function: Callable[[Tensor], Tensor], first: Tensor, batches: Iterable[Tensor]
) -> float:
    """Return the largest difference of what is answered to a sample, over the largest answer.

    Args:
        function: Takes a batch, and returns an answer a sample.
        first: A batch that begins with the sample; the answer in it is what others are held to.
        batches: Others that do.

    Returns:
        NaN if an answer is not a number.

    >>> dependence(lambda x: x - x.mean(0), torch.tensor([[1.0], [3.0]]), [torch.tensor([[1.0]])])
    1.0
    """
    with torch.no_grad():
        wanted = function(first)[:1]
        return float(torch.tensor([apart(function(each)[:1], wanted) for each in batches]).max())


def _layer(seed: int, rank: int, dtype: torch.dtype, activation: str | None) -> nn.Module:
    layer = _LAYERS[rank](_CHANNELS, dtype=dtype, activation=activation)
    generator = stream(seed, "claims", "batch-independence", "layer", rank)
    values = {
        name: torch.randn(_CHANNELS, generator=generator)
        for name in ("weight", "bias", "running_mean")
    }
    values["running_var"] = torch.rand(_CHANNELS, generator=generator) + 0.1
    layer.load_state_dict(values, strict=False)  # All but the count of batches.
    return layer.eval()


def _layers(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Yield the dependence of layers, by the layout of their input and what is fused with them."""
    for rank, (shape, sizes) in enumerate(_SHAPES.items()):
        generator = stream(seed, "claims", "batch-independence", shape)
        draws = (2, _COMPANY + 1, _CHANNELS, *sizes)
        x, other = torch.randn(draws, generator=generator, dtype=torch.float64).to(dtype)
        for name, memory in _MEMORY[rank].items():
            first, *batches = (
                each.contiguous(memory_format=memory) for each in (x[:1], *companies(x, other[1:]))
            )
            for activation in (None, "relu"):
                layer = _layer(seed, rank, dtype, activation)
                ways = {"": (lambda x, f=layer: f(x)), ", added": (lambda x, f=layer: f(x, x))}
                for way, function in ways.items():
                    yield f"{shape}{name}, {activation}{way}", dependence(function, first, batches)


def _networks(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yield the dependence of networks, in evaluation mode and in training mode."""
    drawn, _ = images(seed, 2 * (_COMPANY + 1))
    x, other = drawn.to(dtype).split(_COMPANY + 1)
    for kind, arm in _NETWORKS:
        if kind == "resnet18" and dtype == torch.float64:
            continue  # As long as all the rest together.
        model = network(kind, arm, seed, dtype=dtype)
        # The running statistics are those of neither batch.
        in_training = dependence(model, x, [torch.cat([x[:1], other[1:]])])
        in_evaluation = dependence(model.eval(), x[:1], companies(x, other[1:]))
        yield f"{kind} {arm}", in_evaluation, in_training


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    for seed in work.seeds:
        rows = []
        for name, dtype in _TYPES.items():
            for variant, value in _layers(seed, dtype):
                rows.append(Row(f"layers, {name}", variant, 0, value))
            for variant, value, in_training in _networks(seed, dtype):
                rows.append(Row(f"networks, {name}", variant, 0, value))
                if name == "float32":
                    rows.append(Row(_TRAINING, variant, 0, in_training))
        yield seed, rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    exact = {arm: of_arm(frame, arm) for arm in _EXACT}
    return {**exact, _TRAINING: of_arm(frame, _TRAINING, reduce=np.min)}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import pandas as pd

    rows = [
        {"arm": arm, "seed": seed, "value": max(value, _ZERO)}
        for arm, values in _effects(frame).items()
        for seed, value in zip(sorted(set(frame["seed"])), values, strict=True)
    ]
    return dots(
        pd.DataFrame(rows),
        title="How far an answer is from the one that the sample gets in another batch",
        x=f"{_APART}; at {_ZERO:g}: none",
        arms=[*_EXACT, _TRAINING],
        log_x=True,
    )


CLAIM = Claim(
    name="batch-independence",
    statement=(
        "In evaluation mode what a network with batch norm answers to a sample does not depend on "
        "what else is in its batch; in training mode it does."
    ),
    source="Ioffe and Szegedy, 2015",
    metric=f"{_APART}, of the answers to one sample, alone and in other batches; the worst batch.",
    published="An argument, and no figure.",
    setup=(
        "A sample alone, with seven others, with one, with seven different ones, with these times "
        "1,000, and with seven that are not numbers. normlab's layers on inputs of two to five "
        "dimensions, contiguous and channels last, with and without fused ReLU and addition; and "
        "untrained networks on MNIST: 784-128-128-10 with the norm before or after the activation "
        "or on the input, LeNet, and in float32 ResNet-18, with normlab's layers and torch's, "
        "after two batches in training mode. Training mode: the sample with two different sevens. "
        "A quick run is the same."
    ),
    parts=(
        # A layer multiplies and adds: a rounding or two of its largest output, whatever the kernel.
        Part("layers, float32", "exact", 5e-7),
        Part("layers, float64", "exact", 1e-15),
        # Products of matrices sum in an order that depends on their size, up to 4,608 terms.
        Part("networks, float32", "exact", 1e-5),
        Part("networks, float64", "exact", 1e-13),
        # 1% of the largest answer: what could change a prediction.
        Part(_TRAINING, "more", 0.01),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    is_cheap=True,
)
