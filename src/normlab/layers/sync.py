"""Batch statistics over the ranks of a process group, on any backend.

Each rank sends its count, means and sums of squared deviations forward, and two sums a channel
backward: one collective each way. The counts travel along, so that ranks may hold batches of
unequal size, or none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from normlab.layers.functional import Moments, activate, moments, normalize

__all__ = ["group", "normalize_by_group"]


def group(process_group: Any = None) -> Any:
    """Return the group to share statistics with, or None if there is nobody to share them with."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    process_group = dist.group.WORLD if process_group is None else process_group
    return process_group if dist.get_world_size(process_group) > 1 else None


def normalize_by_group(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
    mask: Tensor | None,
    process_group: Any,
) -> tuple[Tensor, Moments]:
    """Do as `fused.normalize_by_batch`, with the statistics of the whole group's batch.

    The gradients of γ and β are this rank's share, as in `torch.nn.SyncBatchNorm`: data-parallel
    training adds them up.

    Arguments as there, and the process group as `group` returned it.

    Raises:
        ValueError: The group has a single value per channel.
    """
    wide_mask = None if mask is None else mask.unsqueeze(1)
    batch = _combine(input.detach(), wide_mask, process_group)
    if mask is None and batch.count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, over all ranks; got input size "
            f"{tuple(input.shape)}: use larger batches, drop_last=True, or eval()"
        )
    z: Tensor = _Normalize.apply(input, weight, bias, batch, wide_mask, eps, process_group)
    return activate(z if residual is None else z + residual, activation, negative_slope), batch


def _combine(input: Tensor, mask: Tensor | None, process_group: Any) -> Moments:
    channels = input.shape[1]
    if input.numel():
        mean, var, count = moments(input, mask)
    else:
        mean, var, count = input.new_zeros(channels), input.new_zeros(channels), 0
    count = torch.as_tensor(count, dtype=torch.float64, device=input.device)
    mine = torch.cat([count.view(1), mean.double(), var.double() * count])
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everybody, mine, group=process_group)
    counts, means, squares = torch.stack(everybody).split([1, channels, channels], dim=1)
    total = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean) ** 2).sum(0) / total
    return Moments(mean, var, counts.sum())


class _Normalize(torch.autograd.Function):
    """Normalizes by shared statistics; the backward pass shares the sums that come back to them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: Moments,
        mask: Tensor | None,
        eps: float,
        process_group: Any,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, batch.mean, batch.var, batch.count, mask)
        ctx.eps, ctx.process_group = eps, process_group
        return normalize(input, batch.mean, batch.var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, mean, var, count, mask = ctx.saved_tensors
        # Normalized without γ and β; the sums run in the dtype of the statistics.
        normalized = normalize(input, mean, var, None, None, ctx.eps)
        over = [dim for dim in range(input.ndim) if dim != 1]
        grad_bias = grad.sum(over, dtype=torch.float64)
        grad_weight = (grad * normalized).sum(over, dtype=torch.float64)
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums, group=ctx.process_group)
        shift, tilt = (sums / count.clamp(min=1)).view(2, -1, *[1] * (input.ndim - 2))
        pull = shift + tilt * normalized  # How a value acts through the shared mean and variance.
        if mask is not None:
            pull = torch.where(mask, pull, 0)
        scale = torch.rsqrt(var + ctx.eps)
        if weight is not None:
            scale = scale * weight
        grad_input = (grad - pull) * scale.view(-1, *[1] * (input.ndim - 2))
        parameters = (
            None if weight is None else part.to(weight.dtype) for part in (grad_weight, grad_bias)
        )
        return grad_input.to(input.dtype), *parameters, None, None, None, None
