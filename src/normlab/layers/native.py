"""The kernels of `batch_norm.cpp`, called with tensors."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normlab.kernels import ACTIVATIONS, BUILT, kernel

__all__ = [
    "ACTIVATIONS",
    "ARITHMETIC",
    "BUILT",
    "backward",
    "forward",
    "memory_format",
    "warn_once",
]

ARITHMETIC = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
"""The dtypes of values that there are kernels for, with that of what is kept for a channel."""

_DTYPES = {dtype: number for number, dtype in enumerate(ARITHMETIC)}
_int, _size, _real, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SHAPE: list[Any] = [_int, _int, _size, _size, _size, _size]
_OPTIONS: list[Any] = [_real, _int, _real, _int]
_FORWARD = [*_SHAPE, *[_pointer] * 6, _real, *_OPTIONS, *[_pointer] * 2, _int]
_BACKWARD = [*_SHAPE, *[_pointer] * 6, *_OPTIONS, *[_pointer] * 4, _int]


@lru_cache(maxsize=1)
def warn_once() -> None:
    """Say how to get the kernels."""
    warnings.warn(
        "normlab's fast kernels are not built, so torch's do the work: install a C++ compiler, and "
        "run python -m normlab.kernels",
        stacklevel=2,
    )


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    return kernel("normlab_forward", _FORWARD), kernel("normlab_backward", _BACKWARD)


def memory_format(input: Tensor) -> torch.memory_format:
    """Return the layout in which the kernels read a tensor of shape (N, C, …), and write theirs."""
    if not input.is_contiguous():
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if input.ndim == 5 and input.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    training: bool,
    replicas: int,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return `act((x − μ)/√(σ² + ε)·γ + β + residual)`, and the statistics that were used.

    Args:
        input: Shape (N, C, …), or (R·N, C, …) if there are R replicas, one after the other, with
            statistics of their own; a dtype of `ARITHMETIC`.
        residual: Shape and dtype of `input`; only with `activation` None or "relu".
        weight: γ, shape (R·C,).
        bias: β, shape (R·C,).
        running_mean: Shape (R·C,); moved in place in training, used otherwise.
        running_var: The same. If they are to move, their dtype is the arithmetic one.
        eps: ε.
        activation: A key of `ACTIVATIONS`.
        negative_slope: Of "leaky_relu".
        training: Normalize by the batch's own statistics.
        replicas: R.
        momentum: Of the running statistics.

    Returns:
        The output, and μ and σ² (biased) in float64, of shape (2, R·C).
    """
    layout = memory_format(input)
    dtype = input.dtype
    arithmetic = ARITHMETIC[dtype]
    input = input.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    weight, bias, running_mean, running_var = (
        tensor
        if tensor is None or (tensor.dtype == arithmetic and tensor.is_contiguous())
        else tensor.to(arithmetic).contiguous()
        for tensor in (weight, bias, running_mean, running_var)
    )
    output = torch.empty_like(input)
    statistics = torch.empty(2, replicas * input.shape[1], dtype=torch.float64, device="cpu")
    _kernels()[0](
        *_shape(input, replicas),
        input.data_ptr(),
        residual if residual is None else residual.data_ptr(),
        weight if weight is None else weight.data_ptr(),
        bias if bias is None else bias.data_ptr(),
        running_mean if running_mean is None else running_mean.data_ptr(),
        running_var if running_var is None else running_var.data_ptr(),
        momentum,
        eps,
        ACTIVATIONS[activation],
        negative_slope,
        training,
        output.data_ptr(),
        statistics.data_ptr(),
        torch.get_num_threads(),
    )
    return output, statistics


def backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
    training: bool,
    replicas: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `forward` for input, residual, weight and bias; empty where unasked.

    Args:
        grad: ∂L/∂output, shape of `input`.
        input: As given to `forward`.
        output: What `forward` returned, if it had a residual; otherwise None.
        weight: As given to `forward`.
        bias: As given to `forward`.
        statistics: As returned by `forward`.
        eps: As given to `forward`.
        activation: As given to `forward`.
        negative_slope: As given to `forward`.
        training: As given to `forward`.
        replicas: As given to `forward`.
        wanted: Whether ∂L/∂γ and ∂L/∂β are.
    """
    layout = memory_format(input)
    arithmetic = ARITHMETIC[input.dtype]
    input = input.contiguous(memory_format=layout)
    grad = grad.contiguous(memory_format=layout)
    dtypes = [arithmetic if tensor is None else tensor.dtype for tensor in (weight, bias)]
    weight, bias = (
        tensor
        if tensor is None or (tensor.dtype == arithmetic and tensor.is_contiguous())
        else tensor.to(arithmetic).contiguous()
        for tensor in (weight, bias)
    )
    grad_input = torch.empty_like(input)
    if output is None:
        grad_residual = input.new_empty(0)
    else:
        output = output.contiguous(memory_format=layout)
        grad_residual = torch.empty_like(input)
    grad_weight, grad_bias = (
        torch.empty(statistics.shape[1] if want else 0, dtype=arithmetic, device="cpu")
        for want in wanted
    )
    _kernels()[1](
        *_shape(input, replicas),
        grad.data_ptr(),
        input.data_ptr(),
        output if output is None else output.data_ptr(),
        weight if weight is None else weight.data_ptr(),
        bias if bias is None else bias.data_ptr(),
        statistics.data_ptr(),
        eps,
        ACTIVATIONS[activation],
        negative_slope,
        training,
        grad_input.data_ptr(),
        None if output is None else grad_residual.data_ptr(),
        grad_weight.data_ptr() if wanted[0] else None,
        grad_bias.data_ptr() if wanted[1] else None,
        torch.get_num_threads(),
    )
    return grad_input, grad_residual, grad_weight.to(dtypes[0]), grad_bias.to(dtypes[1])


def _shape(input: Tensor, replicas: int) -> tuple[int, int, int, int, int, int]:
    samples, channels = input.shape[:2]
    positions = input.numel() // (samples * channels)
    interleaved = positions == 1 or not input.is_contiguous()
    return _DTYPES[input.dtype], interleaved, replicas, samples // replicas, channels, positions
