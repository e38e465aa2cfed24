"""How stacked parameters, and with them images, lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab import layers
from normlab.kernels import BUILT

__all__ = ["channels_last", "laid_out", "may_have_channels_last"]

_OURS = (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, layers.SyncBatchNorm)


def laid_out(parameter: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a stacked parameter whose replicas have the given strides, if these leave no gap."""
    outer = parameter[0].numel()
    sizes = sorted(each for each in zip(strides, parameter.shape[1:], strict=True) if each[1] > 1)
    if [stride for stride, _ in sizes] != [1, *accumulate((n for _, n in sizes), mul)][:-1]:
        return parameter
    laid = parameter.new_empty_strided(parameter.shape, (outer, *strides))
    return laid.copy_(parameter)


def channels_last(parameter: Tensor) -> Tensor:
    """Return stacked weights of convolutions, (R, O, I, H, W), with I the last in memory."""
    inner, height, width = parameter.shape[2:]
    return laid_out(parameter, (inner * height * width, 1, width * inner, inner))


def may_have_channels_last(network: nn.Module) -> bool:
    """Tell whether a network computes the same, but for roundings, with its channels last.

    torch's batch and group norms do not on a CPU: they then add up a channel's values one by one in
    float32, and are wrong in the fifth or sixth digit where they are right in the seventh on planar
    images. normlab's batch norm is as exact there, by its kernels.
    """
    ours = _OURS if BUILT else ()
    inexact = (_BatchNorm, nn.GroupNorm)
    return not any(isinstance(m, inexact) and not isinstance(m, ours) for m in network.modules())
