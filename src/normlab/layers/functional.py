"""Batch normalization as mathematics: what it computes, and its derivative, written out.

For an input `x` of shape (N, C, …), a channel has `m = N·…` values. In training

    μ = Σx / m        σ² = Σ(x − μ)² / m        x̂ = (x − μ) / √(σ² + ε)        y = γ x̂ + β

and the running statistics move toward the batch's: `running ← (1 − a)·running + a·batch`, where
`a` is the momentum (the weight of the new batch) and the running variance takes the unbiased
`σ² · m/(m−1)`. In evaluation the running statistics stand in for μ and σ², so that an output
depends on its own input alone.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "batch_norm", "batch_norm_backward", "moments", "normalize"]


class Moments(NamedTuple):
    """Mean and biased variance of each channel, both of shape (C,)."""

    mean: Tensor
    var: Tensor


def moments(input: Tensor) -> Moments:
    """Return the mean and the biased variance of each channel.

    The variance is taken around the mean, in two passes: `E[x²] − μ²` would lose every digit when
    the mean is large against the deviation. Half-precision input is summed in float32.

    Args:
        input: Shape (N, C, …).

    >>> moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    Moments(mean=tensor([1., 1.]), var=tensor([1., 0.]))
    """
    input = input.to(_statistics_dtype(input))
    var, mean = torch.var_mean(input, dim=_reduced(input), correction=0)
    return Moments(mean, var)


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
        momentum: a, the weight of the new batch in the running statistics. A tensor is allowed, so
            that a cumulative average needs no transfer to the host.
        eps: ε, added to the variance.

    Returns:
        Shape and dtype of `input`.

    Raises:
        ValueError: In training, a channel has a single value, whose variance says nothing, or ε is
            not positive.
        RuntimeError: A per-channel tensor has another length than the input has channels, or
            statistics are missing in evaluation.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(x, None, None, training=True)
    tensor([[-1.0000],
            [ 1.0000]])
    """
    _check_channels(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "batch_norm with training=False needs running_mean and running_var, and got None: "
                "pass them, or training=True to use the batch's own statistics"
            )
        return normalize(input, running_mean, running_var, weight, bias, eps)
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    count = input.numel() // max(input.shape[1], 1)
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(input.shape)}: use a larger batch, drop_last=True, or eval()"
        )
    if count == 0:  # No values, no statistics: the running ones stay as they are.
        nothing = input.new_zeros(input.shape[1])
        return normalize(input, nothing, nothing, weight, bias, eps)
    mean, var = moments(input.detach())
    with torch.no_grad():
        if running_mean is not None:
            _move(running_mean, mean, momentum)
        if running_var is not None:
            _move(running_var, var * (count / (count - 1)), momentum)
    output: Tensor = _BatchNormTraining.apply(input, weight, bias, mean, var, eps)
    return output


class _BatchNormTraining(torch.autograd.Function):
    """Ties `normalize` by a batch's own statistics to `batch_norm_backward`."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        return normalize(input, mean, var, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        input, weight, _, mean, var, ctx.eps = inputs
        ctx.save_for_backward(input, weight, mean, var)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted, and the statistics are functions of the input too.
            mean, var = moments(input)
        gradients = batch_norm_backward(grad_output, input, mean, var, weight, ctx.eps)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None


def _statistics_dtype(input: Tensor) -> torch.dtype:
    """Statistics of half-precision values are kept in float32."""
    return torch.promote_types(input.dtype, torch.float32)


def _reduced(input: Tensor) -> list[int]:
    """Return the dimensions that a channel's values lie along: all but the second."""
    return [dim for dim in range(input.ndim) if dim != 1]


def _along_channels(per_channel: Tensor, input: Tensor) -> Tensor:
    """View a tensor of shape (C,) so that it broadcasts against (N, C, …)."""
    return per_channel.view(-1, *[1] * (input.ndim - 2))


def _move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    if isinstance(momentum, Tensor):
        momentum = momentum.to(running.dtype)
    running.lerp_(batch.to(running.dtype), momentum)


def _check_channels(input: Tensor, **per_channel: Tensor | None) -> None:
    if input.ndim < 2:
        raise ValueError(
            f"batch_norm expected an input of shape (N, C, …), got {tuple(input.shape)}"
        )
    for name, tensor in per_channel.items():
        if tensor is not None and tensor.numel() != input.shape[1]:
            raise RuntimeError(
                f"{name} should contain {input.shape[1]} elements, one for each channel of the "
                f"input {tuple(input.shape)}, not {tensor.numel()}"
            )
