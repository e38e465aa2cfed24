"""How stacked parameters, and with them images, lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from normlab import layers

__all__ = ["channels_last", "laid_out", "may_have_channels_last"]


def laid_out(parameter: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a stacked parameter whose replicas have the given strides, if these leave no gap."""
    outer = parameter[0].numel()
    sizes = sorted(each for each in zip(strides, parameter.shape[1:], strict=True) if each[1] > 1)
    if [stride for stride, _ in sizes] != [1, *accumulate((n for _, n in sizes), mul)][:-1]:
        return parameter
    return torch.empty_strided(parameter.shape, (outer, *strides), dtype=parameter.dtype).copy_(
        parameter
    )


def channels_last(parameter: Tensor) -> Tensor:
    """Return stacked weights of convolutions, (R, O, I, H, W), with I the last in memory."""
    inner, height, width = parameter.shape[2:]
    return laid_out(parameter, (inner * height * width, 1, width * inner, inner))


def may_have_channels_last(network: nn.Module) -> bool:
    """Tell whether a network computes the same, but for roundings, with its channels last.

    torch's batch norm does not on a CPU: it then adds up all values of a channel one by one in
    float32, and is wrong in the fifth digit where it is right in the seventh on planar images.
    """
    torchs = (nn.BatchNorm2d, nn.SyncBatchNorm)
    ours = (layers.BatchNorm2d, layers.SyncBatchNorm)
    return not any(isinstance(m, torchs) and not isinstance(m, ours) for m in network.modules())
