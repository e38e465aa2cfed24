"""Layers that stand where a norm stood: other kinds with what followed inside it, and a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.layers import RMSNorm

__all__ = ["STANDINS", "STANDIN_FOR", "ChannelScale", "Follows"]


class ChannelScale(nn.Module):
    """Multiply each channel by γ and add β: a norm without the normalizing.

    Args:
        num_channels: C.

    Shape: (N, C, …) to the same.

    >>> import torch
    >>> ChannelScale(2)(torch.ones(1, 2)).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, input: Tensor) -> Tensor:
        shape = (-1, *[1] * (input.ndim - 2))
        return input * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


class Follows(nn.Module):
    """Adds and activates after what it is mixed into, as normlab's batch norm layers do.

    Attributes:
        activation: One of theirs, or None.
        negative_slope: Of "leaky_relu".
    """

    activation: str | None
    negative_slope: float

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize `input`, add `residual`, activate."""
        output: Tensor = super().forward(input)
        if residual is not None:
            output = output + residual
        if self.activation is None:
            return output
        if self.activation == "leaky_relu":
            return F.leaky_relu(output, self.negative_slope)
        return {"relu": F.relu, "sigmoid": F.sigmoid, "silu": F.silu}[self.activation](output)

    def extra_repr(self) -> str:
        before = super().extra_repr()
        return f"{before}{', ' if before else ''}activation={self.activation!r}"


# Named in the module, so that they pickle.
class BatchNorm1dFollows(Follows, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, and what follows."""


class BatchNorm2dFollows(Follows, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, and what follows."""


class BatchNorm3dFollows(Follows, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, and what follows."""


class SyncBatchNormFollows(Follows, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, and what follows."""


class GroupNormFollows(Follows, nn.GroupNorm):
    """`torch.nn.GroupNorm`, and what follows."""


class LayerNormFollows(Follows, nn.LayerNorm):
    """`torch.nn.LayerNorm`, and what follows."""


class InstanceNorm1dFollows(Follows, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, and what follows."""


class InstanceNorm2dFollows(Follows, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, and what follows."""


class InstanceNorm3dFollows(Follows, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, and what follows."""


class RMSNormFollows(Follows, RMSNorm):
    """`normlab.layers.RMSNorm`, and what follows."""


class ChannelScaleFollows(Follows, ChannelScale):
    """`ChannelScale`, and what follows."""


class IdentityFollows(Follows, nn.Identity):
    """Nothing, and what follows."""


STANDINS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[2]: cls for cls in Follows.__subclasses__()
}
"""By class: the one that also does what follows."""

STANDIN_FOR: dict[type[nn.Module], type[nn.Module]] = {
    standin: cls for cls, standin in STANDINS.items()
}
"""The other way round."""
