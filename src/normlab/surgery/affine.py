"""Batch norms as what they are in evaluation, `x·s + t` per channel, and layers that take it in.

All arithmetic is in float64 on the CPU, so that a folded weight is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["Affine", "Layer", "Weights", "after", "before", "in_float64", "of_norm", "why_inexact"]

Layer = _ConvNd | nn.Linear


class Affine(NamedTuple):
    """`x·scale + shift`, each of shape (C,)."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """Of a layer: `weight` in the layer's own shape, `bias` of shape (output channels,)."""

    weight: Tensor
    bias: Tensor


def of_norm(norm: _BatchNorm) -> Affine:
    """Return what a batch norm with running statistics does in evaluation.

    `s = γ/√(σ² + ε)` and `t = β − μ·s` (Ioffe & Szegedy 2015, algorithm 2).

    >>> of_norm(nn.BatchNorm1d(1, eps=0)).scale
    tensor([1.], dtype=torch.float64)
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (_float64(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _float64(norm.weight)
    shift = -_float64(norm.running_mean) * scale
    return Affine(scale, shift if norm.bias is None else shift + _float64(norm.bias))


def in_float64(layer: Layer) -> Weights:
    """Return a layer's weights; a bias that it has not is zero."""
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if layer.bias is None:
        return Weights(_float64(layer.weight), torch.zeros(outputs, dtype=torch.float64))
    return Weights(_float64(layer.weight), _float64(layer.bias))


def after(layer: Layer, weights: Weights, norm: Affine) -> Weights:
    """Return the weights with which a layer also does the batch norm that follows it.

    `W' = s·W` and `b' = s·b + t`, with s of each weight's output channel.

    >>> scale, shift = torch.tensor([2.0, 3.0]).double(), torch.ones(2).double()
    >>> weights = Weights(torch.ones(2, 1).double(), torch.ones(2).double())
    >>> after(nn.Linear(1, 2), weights, Affine(scale, shift)).bias.tolist()
    [3.0, 4.0]
    """
    if isinstance(layer, _ConvTransposeNd):
        # Of shape (inputs, outputs / groups, …), where the inputs are in order of their groups.
        grouped = weights.weight.unflatten(0, (layer.groups, -1))
        scale = norm.scale.view(layer.groups, 1, -1, *[1] * (weights.weight.ndim - 2))
        weight = (grouped * scale).flatten(0, 1)
    else:
        weight = weights.weight * norm.scale.view(-1, *[1] * (weights.weight.ndim - 1))
    return Weights(weight, weights.bias * norm.scale + norm.shift)


def before(layer: Layer, weights: Weights, norm: Affine) -> Weights:
    """Return the weights with which a layer also does the batch norm that precedes it.

    `W' = W·s` and `b' = b + Σ W·t`, with s and t of each weight's input channel, and the sum over
    input channels and the kernel. That holds where `why_inexact` has nothing to say.

    >>> scale, shift = torch.tensor([2.0, 3.0]).double(), torch.ones(2).double()
    >>> weights = Weights(torch.ones(1, 2).double(), torch.ones(1).double())
    >>> before(nn.Linear(2, 1), weights, Affine(scale, shift)).bias.tolist()
    [3.0]
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    rest = [1] * (weights.weight.ndim - 2)
    grouped = weights.weight.unflatten(0, (groups, -1))
    if isinstance(layer, _ConvTransposeNd):  # (groups, inputs / groups, outputs / groups, …)
        scale, shift = (each.view(groups, -1, 1, *rest) for each in norm)
        added = (grouped * shift).flatten(3).sum(-1)
        bias = added.sum(1).flatten()
    else:  # (groups, outputs / groups, inputs / groups, …)
        scale, shift = (each.view(groups, 1, -1, *rest) for each in norm)
        bias = (grouped * shift).flatten(2).sum(-1).flatten()
    return Weights((grouped * scale).flatten(0, 1), weights.bias + bias)


def why_inexact(layer: Layer, norm: Affine) -> str:
    """Return why a layer cannot do the batch norm that precedes it exactly; empty if it can.

    What is padded with zeros after the batch norm would have to be padded with -t/s before it, and
    at its borders a transposed convolution adds up only parts of its kernel.

    >>> norm = of_norm(nn.BatchNorm2d(1, bias=False))
    >>> why_inexact(nn.Conv2d(1, 1, 3, padding=1), norm)
    ''
    >>> why_inexact(nn.Conv2d(1, 1, 3, padding=1), norm._replace(shift=torch.ones(1)))
    'pads with zeros, which the batch norm would have shifted'
    """
    if isinstance(layer, nn.Linear) or not norm.shift.any():
        return ""
    point = set(layer.kernel_size) == {1}
    if isinstance(layer, _ConvTransposeNd):
        plain = point and set(layer.stride) == {1} and not any(layer.output_padding)
        exact = plain and not any(layer.padding)
        return "" if exact else "is transposed: what is shifted before it differs at its borders"
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return ""
    padded = not point if layer.padding == "same" else any(layer.padding)
    return "pads with zeros, which the batch norm would have shifted" if padded else ""


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
