"""The normalizations that can stand in a network's norm slot, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab.errors import InputError
from normlab.layers.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["NORM_LAYERS", "NormConstructor", "RMSNorm", "norm_constructor", "norm_names"]

NormConstructor = Callable[[int, int], "nn.Module | None"]
"""Takes the number of channels and of spatial dimensions (0 for (N, C)); returns the layer, or None
where there is nothing to normalize over."""


class RMSNorm(nn.Module):
    """Divide each sample by the root of its mean square, over all channels and positions.

    `torch.nn.RMSNorm` works on trailing dimensions; networks of images have channels first.

    Args:
        num_channels: C.
        eps: Added to the mean square.

    Shape: (N, C, …) to the same.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    >>> RMSNorm(2)(torch.tensor([[3.0, -3.0]])).detach().round(decimals=3)
    tensor([[ 1., -1.]])
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, input: Tensor) -> Tensor:
        mean_square = input.square().mean(dim=list(range(1, input.ndim)), keepdim=True)
        weight = self.weight.view(-1, *[1] * (input.ndim - 2))
        return input * torch.rsqrt(mean_square + self.eps) * weight

    def reset_parameters(self) -> None:
        """Set γ to 1."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)
"""Batch and instance norms are `_NormBase`s."""


def norm_constructor(name: str) -> NormConstructor:
    """Return what builds the layers of a named normalization.

    Args:
        name: One of `batch`, `torch-batch`, `layer`, `group:G`, `instance`, `rms`.

    Raises:
        InputError: The name is unknown, or `group` comes without a whole number of groups.

    >>> norm_constructor("group:2")(6, 0).num_groups
    2
    """
    kind, colon, argument = name.partition(":")
    if kind == "group":
        if not argument.isdecimal() or int(argument) == 0:
            raise InputError(f"{name!r}: group norm wants its number of groups, as in group:8")
        return _group(int(argument))
    if kind not in _NORMS or colon:
        known = ", ".join(norm_names())
        raise InputError(f"unknown norm {name!r}: known are {known}")
    return _NORMS[kind]


def norm_names() -> list[str]:
    """Return the names that `norm_constructor` knows, `group` with its argument."""
    return [*_NORMS, "group:8"]


def _batch(channels: int, spatial: int) -> nn.Module:
    return (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)[spatial](channels)


def _torch_batch(channels: int, spatial: int) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial](channels)


def _layer(channels: int, spatial: int) -> nn.Module:
    # Over (C, H, W) with a scale a channel, layer norm is group norm with one group.
    return nn.GroupNorm(1, channels) if spatial else nn.LayerNorm(channels)


def _instance(channels: int, spatial: int) -> nn.Module | None:
    if not spatial:
        return None  # One value a channel and sample: there is nothing to normalize over.
    layers = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return layers[spatial - 1](channels, affine=True)


def _rms(channels: int, spatial: int) -> nn.Module:  # noqa: ARG001 - a constructor's signature
    return RMSNorm(channels)


def _group(groups: int) -> NormConstructor:
    def construct(channels: int, spatial: int) -> nn.Module:
        if channels % groups:
            raise InputError(
                f"group:{groups} does not divide a layer of {channels} channels: "
                "choose a number of groups that divides every layer's"
            )
        if not spatial and channels == groups:
            raise InputError(
                f"group:{groups} on a layer of {channels} features leaves one value in a group, "
                "which it would set to zero: choose fewer groups"
            )
        return nn.GroupNorm(groups, channels)

    return construct


_NORMS: dict[str, NormConstructor] = {
    "batch": _batch,
    "torch-batch": _torch_batch,
    "layer": _layer,
    "instance": _instance,
    "rms": _rms,
}
