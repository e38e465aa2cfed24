"""Batch normalization as users call it: by normlab's kernels, by torch's, or by the reference.

normlab's kernels do the work for tensors in main memory that are worth a call; torch's do it on
other devices, for small tensors, and in programs that are exported, which then run without normlab.
The reference does it where there is a mask.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from normlab.layers import native, operators
from normlab.layers.functional import (
    Moments,
    activate,
    moments,
    move_running,
    normalize,
    without_padding,
)

__all__ = ["SMALL", "batch_norm", "check", "normalize_by_batch"]

SMALL = 1 << 15
"""Values below which the call costs more than the work, so that torch's operator is as fast."""


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize each channel, then add and activate: `torch.nn.functional.batch_norm` and more.

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
        activation: What follows: None, "relu", "leaky_relu", "sigmoid" or "silu". On a CPU it is
            part of the same pass over memory, and nothing is stored between.
        negative_slope: Of "leaky_relu".
        residual: Added before the activation; the shape of `input`.
        mask: True where a value is real, shape (N, …) without C. The statistics are taken over what
            is real; every value is normalized by them. A batch with fewer than two real values
            leaves the running statistics alone.

    Returns:
        Shape and dtype of `input`.

    Raises:
        ValueError: In training, a channel has a single value, whose variance says nothing, or ε is
            not positive; the activation is unknown.
        RuntimeError: A tensor has another shape or device than the input asks for, or statistics
            are missing in evaluation.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(x, None, None, training=True)
    tensor([[-1.0000],
            [ 1.0000]])
    >>> batch_norm(x, None, None, training=True, activation="relu")
    tensor([[0.0000],
            [1.0000]])
    """
    if input.ndim < 2 and not input.numel():
        return input.clone()  # As torch: there is nothing to normalize.
    if residual is None and mask is None:
        output = _try_small(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )
        if output is not None:
            return output
    check(input, running_mean, running_var, weight, bias, activation, residual, mask)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "batch_norm with training=False needs running_mean and running_var, and got None: "
                "pass them, or training=True to use the batch's own statistics"
            )
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        momentum = 0.0  # Nothing moves.
    else:
        _check_training(input, eps, mask)
    way = _way(input, weight, bias, residual, running_mean, running_var)
    if training and (
        mask is not None
        or isinstance(momentum, Tensor)
        or (
            way is not _Way.TORCH
            and not (way is _Way.DIRECT and _moves(input, running_mean, running_var))
        )
    ):
        output, batch = normalize_by_batch(
            input, weight, bias, eps, activation, negative_slope, residual, mask
        )
        if input.numel():
            usable = batch.n > 1 if isinstance(batch.n, Tensor) else None
            move_running(running_mean, batch.mean, momentum, usable)
            move_running(running_var, batch.unbiased_var, momentum, usable)
        return output
    if way is _Way.TORCH:
        assert not isinstance(momentum, Tensor)
        running = (running_mean, running_var)
        z = _torch_batch_norm(input, *running, weight, bias, training, momentum, eps)
        return _follow(z, residual, activation, negative_slope)
    output, _ = _by_kernel(
        way,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        eps,
        activation,
        negative_slope,
        residual,
        training,
        momentum,
    )
    return output


def _try_small(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor | None:
    """Return what `batch_norm` does, if the input is small and all is well; else None.

    For a small tensor the checks would take as long as the work. torch makes most of them itself,
    and `batch_norm` finds the words for what it refuses.
    """
    if operators.is_watched() or input.ndim < 2:
        return None
    # In training a channel needs more than one value.
    if not (
        input.shape[1] * training < input.numel() < SMALL
        and input.is_cpu
        and input.dtype in _SMALL_DTYPES
        and eps > 0
        and not isinstance(momentum, Tensor)
        and activation in native.ACTIVATIONS
    ):
        return None
    try:
        z = _torch_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    except RuntimeError:
        return None
    return z if activation is None else activate(z, activation, negative_slope)


def normalize_by_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Return what `batch_norm` returns in training, and the statistics, moving none.

    Arguments as for `batch_norm`.
    """
    _check_training(input, eps, mask)
    if mask is not None:
        mask = mask.unsqueeze(1)
        input = without_padding(input, mask)
        batch = moments(input, mask)
        z = normalize(input, batch.mean, batch.var, weight, bias, eps)
        return _follow(z, residual, activation, negative_slope), batch
    count = input.numel() // max(input.shape[1], 1)
    way = _way(input, weight, bias, residual)
    if way is _Way.TORCH:
        # Running statistics that take the batch's whole: torch hands the variance out nowhere else.
        mean, var = torch.zeros(
            2, input.shape[1], device=input.device, dtype=_statistics_dtype(input)
        )
        z = _torch_batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
        batch = Moments(mean, var * ((count - 1) / max(count, 1)), count)
        return _follow(z, residual, activation, negative_slope), batch
    follow = (activation, negative_slope, residual)
    output, (mean, var) = _by_kernel(way, input, weight, bias, None, None, eps, *follow, True, 0.0)
    return output, Moments(mean, var, count)


# torch's kernel for bfloat16 rounds scale and shift to it; so for that there is no size too small.
_SMALL_DTYPES = (torch.float32, torch.float64)


class _Way(Enum):
    """Who does the work: torch's kernels, or normlab's, called directly or as an operator."""

    TORCH = 0
    DIRECT = 1
    OPERATOR = 2


_CALLS = {
    _Way.DIRECT: operators.batch_norm_directly,
    _Way.OPERATOR: operators.batch_norm,
}


def _way(input: Tensor, *others: Tensor | None) -> _Way:
    size = input.numel()
    if size == 0 or input.device.type != "cpu" or input.dtype not in native.ARITHMETIC:
        return _Way.TORCH
    if input.layout is not torch.strided:
        return _Way.TORCH
    watched = operators.is_watched()
    if not native.BUILT:
        if not watched:
            native.warn_once()
        return _Way.TORCH
    if watched and torch.compiler.is_exporting():
        return _Way.TORCH
    if watched and operators.is_transformed():
        return _Way.OPERATOR  # Whatever the size, on which a compiler would have to be asked.
    small = size < SMALL and input.dtype in _SMALL_DTYPES
    if small or torch._C._get_tracing_state() is not None:
        return _Way.TORCH
    return _Way.DIRECT if not watched and operators.is_plain(input, *others) else _Way.OPERATOR


def _moves(input: Tensor, *running: Tensor | None) -> bool:
    """Tell whether the kernel itself can move running statistics."""
    wanted = native.ARITHMETIC[input.dtype]
    return all(each is None or (each.dtype == wanted and each.is_contiguous()) for each in running)


def _fuses(input: Tensor, residual: Tensor | None, activation: str | None) -> bool:
    """Tell whether the kernel does what follows the normalization."""
    return residual is None or (activation in (None, "relu") and residual.dtype == input.dtype)


def _by_kernel(
    way: _Way,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
    training: bool,
    momentum: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the output and the statistics that were used, by whatever part the kernel can do."""
    fused = _fuses(input, residual, activation)
    z, statistics = _CALLS[way](
        input,
        residual if fused else None,
        weight,
        bias,
        running_mean,
        running_var,
        eps,
        activation if fused else None,
        negative_slope,
        training,
        1,
        momentum,
    )
    return z if fused else _follow(z, residual, activation, negative_slope), statistics


def _torch_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's second derivatives are wrong for a bias alone.
    if running_mean is not None and weight is not None and weight.dtype != running_mean.dtype:
        # torch's kernels want one dtype for all that is per channel.
        weight = weight.to(running_mean.dtype)
        bias = None if bias is None else bias.to(running_mean.dtype)
    if training and running_mean is not None and not operators.is_watched():
        # In training the backward pass does not read them; so let them change before it.
        running_mean = running_mean.data
        running_var = None if running_var is None else running_var.data
    return torch.batch_norm(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        torch.backends.cudnn.enabled,
    )


def _follow(
    z: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float
) -> Tensor:
    return activate(z if residual is None else z + residual, activation, negative_slope)


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def _check_training(input: Tensor, eps: float, mask: Tensor | None) -> None:
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if mask is None and input.numel() == input.shape[1]:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(input.shape)}: use a larger batch, drop_last=True, or eval()"
        )


_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Refuse tensors that do not belong together, as `batch_norm` says."""
    shape = input.shape
    if len(shape) < 2:
        raise ValueError(f"batch_norm expected an input of shape (N, C, …), got {tuple(shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(
            f"batch_norm expected floating-point input, got {input.dtype}: convert it, as in "
            "input.float()"
        )
    channels, device = shape[1], input.device
    for name, tensor in zip(_PER_CHANNEL, (running_mean, running_var, weight, bias), strict=True):
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements, one for each channel of the "
                f"input {tuple(shape)}, not {tensor.numel()}"
            )
        if tensor.device != device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {name} is on {tensor.device}, the "
                f"input on {device}; move one of them with .to()"
            )
    if activation not in native.ACTIVATIONS:
        known = ", ".join(repr(name) for name in native.ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}: known are {known}")
    if residual is not None and residual.shape != shape:
        raise RuntimeError(
            f"residual of shape {tuple(residual.shape)} cannot be added to an input of shape "
            f"{tuple(shape)}: they must be equal"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (shape[0], *shape[2:])):
        raise RuntimeError(
            f"mask should be of dtype bool and shape {(shape[0], *shape[2:])}, that of the input "
            f"{tuple(shape)} without channels, not {mask.dtype} and {tuple(mask.shape)}"
        )
