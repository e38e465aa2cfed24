"""A bias before batch norm does nothing: the mean that is taken away has it too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normlab.claims.charts import dots
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import of_arm
from normlab.claims.material import apart, hidden_layers, images, network
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "bias_share", "without_biases"]

_MLP, _LENET, _BATCH = "mlp:128,128,128,128", "lenet", 128
_RATE, _STEPS, _QUICK = 0.1, 200, 50
_SHARE, _APART = "‖∂L/∂b‖ / ‖∂L/∂W‖", "difference of outputs"
_TRAINED = "training with and without"
_AS_TORCH = "LeNet, float32, torch's sum"
_ARMS = {
    "MLP, plain": (_MLP, "plain", torch.float64),
    "MLP, float32": (_MLP, "batch", torch.float32),
    "MLP, float64": (_MLP, "batch", torch.float64),
    "LeNet, float32": (_LENET, "batch", torch.float32),
    "LeNet, float64": (_LENET, "batch", torch.float64),
}


def bias_share(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return ‖∂L/∂b‖ / ‖∂L/∂W‖ twice, each of the layer where it is largest, but the output layer.

    ∂L/∂b is the sum of ∂L/∂h, h the layer's output, over images and positions: in the first number
    it is taken in float64, in the second as torch takes it, which for a convolution in float32
    rounds far more than what is summed.

    Args:
        model: A network of `build_network`, in training mode.
        x: Images, shape (N, C, H, W).
        labels: Shape (N,); L is the cross-entropy.
    """
    layers, outputs = hidden_layers(model), list[Tensor]()
    hooks = [layer.register_forward_hook(lambda _m, _x, h: outputs.append(h)) for layer in layers]
    loss = F.cross_entropy(model(x), labels)
    for hook in hooks:
        hook.remove()
    parameters = [each for layer in layers for each in layer.parameters()]
    gradients = torch.autograd.grad(loss, [*outputs, *parameters])
    shares = []
    for k in range(len(layers)):
        summed = gradients[k].transpose(0, 1).flatten(1).double().sum(1)
        weight, bias = gradients[len(layers) + 2 * k :][:2]
        scale = weight.double().norm()
        shares.append((float(summed.norm() / scale), float(bias.norm() / scale)))
    exact, given = map(max, zip(*shares, strict=True))
    return exact, given


def without_biases(model: nn.Module) -> nn.Module:
    """Take the biases of all layers but the output away, in place, and return the network."""
    for layer in hidden_layers(model):
        layer.register_parameter("bias", None)
    return model


def _outputs(model: nn.Module, x: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Yield what a network puts out at each step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)
    for images_, labels_ in zip(x.split(_BATCH), labels.split(_BATCH), strict=True):
        output = model(images_.double())
        optimizer.zero_grad()
        F.cross_entropy(output, labels_).backward()
        optimizer.step()
        yield output.detach()


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    steps = _QUICK if work.quick else _STEPS
    for seed in work.seeds:
        x, labels = images(seed, steps * _BATCH)
        rows = []
        for name, (kind, arm, dtype) in _ARMS.items():
            model = network(kind, arm, seed, dtype=dtype)
            share, given = bias_share(model, x[:_BATCH].to(dtype), labels[:_BATCH])
            rows.append(Row(name, _SHARE, 0, share))
            if name == "LeNet, float32":
                rows.append(Row(_AS_TORCH, _SHARE, 0, given))
        both = network(_MLP, "batch", seed), without_biases(network(_MLP, "batch", seed))
        with_, without = (_outputs(model, x, labels) for model in both)
        rows.append(Row(_TRAINED, _APART, steps, max(map(apart, without, with_))))
        yield seed, rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    arms = [name for name in (*_ARMS, _TRAINED) if name != "MLP, plain"]
    return {_part(name): of_arm(frame, name) for name in arms}


def _part(name: str) -> str:
    return f"{name}: {_APART if name == _TRAINED else _SHARE}"


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return dots(
        frame,
        title="What a bias before batch norm does",
        x=f"{_SHARE}; last row: |difference| / max |output|",
        arms=[*_ARMS, _AS_TORCH, _TRAINED],
        log_x=True,
    )


CLAIM = Claim(
    name="redundant-bias",
    statement="A bias right before batch norm gets no gradient, and can be left out.",
    source="Ioffe and Szegedy, 2015",
    metric=(
        f"{_SHARE} of the hidden layer where it is largest; and max |f₁ − f₂| / max |f₁| of the "
        "outputs of two networks, with and without the biases, the largest over all steps of "
        "training."
    ),
    published="An argument, and no figure.",
    setup=(
        "A perceptron 784-128-128-128-128-10 and LeNet, ReLU, batch norm before it, and a batch of "
        f"{_BATCH} images of MNIST, in float32 and float64. ∂L/∂b is summed over images and "
        "positions in float64; torch's own sum in float32, of 73,728 values in LeNet's first "
        "convolution, rounds more, and is in the figure beside it. The perceptron is trained for "
        f"{_STEPS} steps (quick: {_QUICK}) with SGD at {_RATE} in float64, from biases that are "
        "not zero and without any, and its outputs are compared in training mode."
    ),
    parts=(
        # Roundings of float32 are 1e-7, those of float64 1e-16; a sum over the batch has many.
        Part(_part("MLP, float32"), "exact", 1e-6),
        Part(_part("MLP, float64"), "exact", 1e-14),
        Part(_part("LeNet, float32"), "exact", 1e-6),
        Part(_part("LeNet, float64"), "exact", 1e-14),
        # Training multiplies what roundings make different, from 1e-16 on; this is far below what
        # float32 would leave.
        Part(_part(_TRAINED), "exact", 1e-9),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
)
