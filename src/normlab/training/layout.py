"""How stacked parameters lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

__all__ = ["channels_last", "laid_out"]


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
