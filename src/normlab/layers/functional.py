"""Batch normalization as mathematics: what it computes, and its derivative, written out.

For an input `x` of shape (N, C, …), a channel has `m = N·…` values. In training

    μ = Σx / m        σ² = Σ(x − μ)² / m        x̂ = (x − μ) / √(σ² + ε)        y = γ x̂ + β

and the running statistics move toward the batch's: `running ← (1 − a)·running + a·batch`, where
`a` is the momentum (the weight of the new batch) and the running variance takes the unbiased
`σ² · m/(m−1)`. In evaluation the running statistics stand in for μ and σ², so that an output
depends on its own input alone.

This is the reference: plain operations, which autograd and every transform of torch can follow.
`fused` does the same faster.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Moments",
    "activate",
    "batch_norm",
    "batch_norm_backward",
    "moments",
    "move_running",
    "normalize",
    "without_padding",
]


class Moments(NamedTuple):
    """Mean and biased variance of each channel, both of shape (C,), and the values in a channel."""

    mean: Tensor
    var: Tensor
    n: int | Tensor

    @property
    def unbiased_var(self) -> Tensor:
        """The variance that running statistics hold; NaN or infinite for a single value."""
        return self.var * (self.n / (self.n - 1))


def moments(input: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the mean and the biased variance of each channel.

    The variance is taken around the mean, in two passes: `E[x²] − μ²` would lose every digit when
    the mean is large against the deviation. Half-precision input is summed in float32.

    Args:
        input: Shape (N, C, …).
        mask: True where a value is real; broadcasts against `input`, one for all channels. None if
            all are.

    >>> moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    Moments(mean=tensor([1., 1.]), var=tensor([1., 0.]), n=2)
    >>> moments(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([[True], [True], [False]])).mean
    tensor([1.])
    """
    input = input.to(_statistics_dtype(input))
    if mask is None:
        var, mean = torch.var_mean(input, dim=_reduced(input), correction=0)
        return Moments(mean, var, input.numel() // max(input.shape[1], 1))
    mask = mask.expand(input.shape[0], 1, *input.shape[2:])
    count = mask.sum(dtype=torch.float64)
    real = torch.where(mask, input, 0)  # Padding may hold anything, NaN too.
    mean = real.sum(_reduced(input)) / count.clamp(min=1)
    deviation = torch.where(mask, input - _along_channels(mean, input), 0)
    return Moments(mean, deviation.square().sum(_reduced(input)) / count.clamp(min=1), count)


def without_padding(input: Tensor, mask: Tensor) -> Tensor:
    """Return the input with zeros where padding is not finite: NaN would reach the gradients."""
    return torch.where(mask, input, input.nan_to_num(0, 0, 0))


def normalize(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return `γ (x − μ) / √(σ² + ε) + β`, channel by channel.

    Args:
        input: Shape (N, C, …).
        mean: μ, shape (C,).
        var: σ², shape (C,).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        eps: ε, added to the variance.

    Returns:
        Shape and dtype of `input`.
    """
    dtype = _statistics_dtype(input)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight
    output = (input - _along_channels(mean.to(dtype), input)) * _along_channels(scale, input)
    if bias is not None:
        output = output + _along_channels(bias, input)
    return output.to(input.dtype)


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of batch normalization in training.

    With `g = ∂L/∂y`, sums over the `m` values of a channel and `x̂` as above,

        ∂L/∂β = Σg        ∂L/∂γ = Σ g·x̂        ∂L/∂x = γ/√(σ²+ε) · (g − Σg/m − x̂ · Σ(g·x̂)/m)

    The two terms taken away are the ways in which a value acts through the batch's mean and
    through its variance: no gradient is left along a shift or a scaling of the whole batch.

    Args:
        grad_output: ∂L/∂y, shape (N, C, …).
        input: x, same shape.
        mean: μ of this batch, shape (C,).
        var: σ² of this batch, biased, shape (C,).
        weight: γ, shape (C,), or None for 1.
        eps: ε.

    Returns:
        ∂L/∂x (shape of `input`), ∂L/∂γ and ∂L/∂β (both of shape (C,)).
    """
    dtype = _statistics_dtype(input)
    grad, dims, count = grad_output.to(dtype), _reduced(input), input.numel() // input.shape[1]
    rstd = torch.rsqrt(var + eps)
    normalized = (input - _along_channels(mean, input)) * _along_channels(rstd, input)
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalized).sum(dims)
    scale = rstd if weight is None else rstd * weight
    grad_input = _along_channels(scale, input) * (
        grad
        - _along_channels(grad_bias / count, input)
        - normalized * _along_channels(grad_weight / count, input)
    )
    return grad_input.to(input.dtype), grad_weight, grad_bias


def activate(z: Tensor, activation: str | None, negative_slope: float = 0.01) -> Tensor:
    """Apply the activation of a name: None, "relu", "leaky_relu", "sigmoid" or "silu"."""
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return z if activation is None else _ACTIVATIONS[activation](z)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel, with the signature and meaning of `torch.nn.functional.batch_norm`.

    Args:
        input: Shape (N, C, …), floating point.
        running_mean: Shape (C,); used in evaluation, moved in place in training; may be None.
        running_var: Shape (C,); holds the unbiased variance; given or absent with `running_mean`.
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        training: Normalize by the batch's own statistics and move the running ones; otherwise by
            the running ones, which then must be given.
        momentum: a, the weight of the new batch in the running statistics.
        eps: ε, added to the variance.

    Returns:
        Shape and dtype of `input`.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(x, None, None, training=True)
    tensor([[-1.0000],
            [ 1.0000]])
    """
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return normalize(input, running_mean, running_var, weight, bias, eps)
    batch = moments(input)
    move_running(running_mean, batch.mean, momentum)
    move_running(running_var, batch.unbiased_var, momentum)
    return normalize(input, batch.mean, batch.var, weight, bias, eps)


@torch.no_grad()
def move_running(
    running: Tensor | None,
    batch: Tensor,
    momentum: float | Tensor,
    where: Tensor | None = None,
) -> None:
    """Move a running statistic in place: `running ← (1 − a)·running + a·batch`.

    Args:
        running: Shape (C,), or None if there is none.
        batch: Shape (C,).
        momentum: a; a tensor needs no transfer to the host.
        where: Move only where this is True; None for everywhere.
    """
    if running is None:
        return
    batch = batch.detach().to(running.dtype)
    if isinstance(momentum, Tensor):
        momentum = momentum.to(running.dtype)
    moved = running.lerp(batch, momentum)
    # A copy, since `vmap` has no rule for `lerp_`.
    running.copy_(moved if where is None else torch.where(where, moved, running))


def _statistics_dtype(input: Tensor) -> torch.dtype:
    """Statistics of half-precision values are kept in float32."""
    return torch.promote_types(input.dtype, torch.float32)


def _reduced(input: Tensor) -> list[int]:
    """Return the dimensions that a channel's values lie along: all but the second."""
    return [dim for dim in range(input.ndim) if dim != 1]


def _along_channels(per_channel: Tensor, input: Tensor) -> Tensor:
    """View a tensor of shape (C,) so that it broadcasts against (N, C, …)."""
    return per_channel.view(-1, *[1] * (input.ndim - 2))
