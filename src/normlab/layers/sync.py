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

from normlab.layers.functional import Moments, activate, moments, without_padding

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
        ValueError: The group has a single value per channel, or ε is not positive.
    """
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    wide_mask = None if mask is None else mask.unsqueeze(1)
    if wide_mask is not None:
        input = without_padding(input, wide_mask)
    batch = _combine(input.detach(), wide_mask, process_group)
    if mask is None and batch.n == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, over all ranks; got input size "
            f"{tuple(input.shape)}: use larger batches, drop_last=True, or eval()"
        )
    z: Tensor = _Normalize.apply(input, weight, bias, batch, wide_mask, eps, process_group)
    return activate(z if residual is None else z + residual, activation, negative_slope), batch


def _combine(input: Tensor, mask: Tensor | None, process_group: Any) -> Moments:
    channels = input.shape[1]
    mine = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=input.device)
    if input.numel():
        near = moments(input, mask).mean
        # float32 rounds a large mean by much of a small deviation, but not what it is above a
        # value near it.
        rest, var, n = moments(input - _along_channels(near, input), mask)
        n = torch.as_tensor(n, dtype=torch.float64, device=input.device)
        mine = torch.cat([n.view(1), near.double() + rest.double(), var.double() * n])
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
        ctx.save_for_backward(input, weight, bias, batch.mean, batch.var, batch.n, mask)
        ctx.eps, ctx.process_group = eps, process_group
        output = _normalized(input, batch.mean, batch.var, eps)
        if weight is not None:
            output = output * _along_channels(weight, input)
        if bias is not None:
            output = output + _along_channels(bias, input)
        return output.to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, bias, mean, var, count, mask = ctx.saved_tensors
        normalized = _normalized(input, mean, var, ctx.eps)
        over = [dim for dim in range(input.ndim) if dim != 1]
        by_bias = grad.sum(over, dtype=torch.float64)
        by_weight = (grad * normalized).sum(over, dtype=torch.float64)
        sums = torch.cat([by_bias, by_weight])
        dist.all_reduce(sums, group=ctx.process_group)
        shift, tilt = (sums / count.clamp(min=1)).to(normalized.dtype).chunk(2)
        # How a value acts through the shared mean and variance.
        pull = _along_channels(shift, input) + _along_channels(tilt, input) * normalized
        if mask is not None:
            pull = torch.where(mask, pull, 0)
        scale = torch.rsqrt(var + ctx.eps)
        if weight is not None:
            scale = scale * weight
        by_input = (grad - pull) * _along_channels(scale.to(normalized.dtype), input)
        return (
            by_input.to(input.dtype),
            None if weight is None else by_weight.to(weight.dtype),
            None if bias is None else by_bias.to(bias.dtype),
            *[None] * 4,
        )


def _normalized(input: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return `(x − μ) / √(σ² + ε)`, in float32 for half-precision input."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    rstd = torch.rsqrt(var + eps)
    shift = mean.to(dtype)
    rest = (mean - shift) * rstd  # Of a large mean, what float32 cuts off is much of a deviation.
    scaled = (input - _along_channels(shift, input)) * _along_channels(rstd.to(dtype), input)
    return scaled - _along_channels(rest.to(dtype), input)


def _along_channels(per_channel: Tensor, input: Tensor) -> Tensor:
    """View a tensor of shape (C,) so that it broadcasts against (N, C, …)."""
    return per_channel.view(-1, *[1] * (input.ndim - 2))
