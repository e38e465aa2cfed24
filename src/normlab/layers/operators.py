"""The kernels as operators of torch, so that compilers and transforms know how to handle them.

`normlab::batch_norm` and `normlab::batch_norm_backward` have no side effects. They have rules for
fake tensors (shapes alone), for autograd, and for `torch.vmap`, which becomes a replica axis of the
kernel. What the kernel's derivative cannot serve, the reference does: forward-mode derivatives,
`torch.func`'s, and derivatives of derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normlab.layers import native
from normlab.layers.functional import activate, moments, normalize

__all__ = ["batch_norm", "batch_norm_directly", "is_plain", "is_transformed", "is_watched"]

_library = torch.library.Library("normlab", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? running_mean, Tensor? running_var, float eps, str? activation, float negative_slope, "
    "bool training, int replicas) -> (Tensor output, Tensor statistics)",
    tags=_TAGS,
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, "
    "Tensor statistics, float eps, str? activation, float negative_slope, bool training, "
    "int replicas, bool[2] wanted) -> (Tensor input, Tensor residual, Tensor weight, Tensor bias)",
    tags=_TAGS,
)
_library.impl("batch_norm", native.forward, "CPU")
_library.impl("batch_norm_backward", native.backward, "CPU")


def is_watched() -> bool:
    """Tell whether something else than ordinary autograd looks at what is computed now."""
    return is_transformed() or torch._C._len_torch_dispatch_stack() != 0


def is_transformed() -> bool:
    """Tell whether what is computed now is compiled, vectorized or differentiated forward."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Tell whether the values of tensors are what lies in their memory."""
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return True


def batch_norm(
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
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Call the operator, which has no side effects: it moves no running statistics."""
    del momentum
    return torch.ops.normlab.batch_norm(
        input,
        residual,
        weight,
        bias,
        None if training else running_mean,
        None if training else running_var,
        eps,
        activation,
        negative_slope,
        training,
        replicas,
    )


def batch_norm_directly(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Call `native.forward` for a plain input, past torch's dispatcher; arguments are the same."""
    if torch.is_grad_enabled() and _needs_grad(*arguments[:4]):
        return _BatchNorm.apply(native.forward, native.backward, *arguments)
    return native.forward(*arguments)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _BatchNorm(torch.autograd.Function):
    """Ties the forward kernel to the backward kernel, called directly or as operators."""

    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *arguments: Any) -> Any:
        output, statistics = forward(*arguments)
        input, residual, weight, bias = arguments[:4]
        ctx.backward, ctx.options = backward, arguments[6:11]
        # After an addition the output stands for the residual: the next layer keeps it anyway.
        ctx.save_for_backward(input, None if residual is None else output, weight, bias, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        if torch.is_grad_enabled() or _is_transformed(grad):
            gradients = _reference_backward(ctx, grad)
        else:
            backward = ctx.backward
            if is_watched() or not is_plain(
                grad
            ):  # Hooks and modes may hand back what has no memory to read.
                backward = torch.ops.normlab.batch_norm_backward
            gradients = backward(grad, *ctx.saved_tensors, *ctx.options, [*needs[4:6]])
        wanted = (gradients[i] if needs[2 + i] else None for i in range(4))
        return None, None, *wanted, *(None,) * (len(needs) - 6)


def _is_transformed(grad: Tensor) -> bool:
    """Tell whether the backward pass is itself vectorized or differentiated."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_legacy_batchedtensor(grad)  # From `is_grads_batched`.
        or forward_ad._current_level >= 0
    )


def _reference_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients by way of the reference, whose operations every transform can follow."""
    input, output, weight, bias, statistics = ctx.saved_tensors
    eps, activation, negative_slope, training, replicas = ctx.options
    if output is not None:  # After an addition: the identity or ReLU, whose slope is 0 or 1.
        grad = grad if activation is None else torch.where(output > 0, grad, 0)
        activation = None
    leaves = [input, weight, bias]
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    mean, var = statistics
    options = (eps, activation, negative_slope, training, replicas)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        again, _ = _reference(input, None, weight, bias, mean, var, *options)
    gradients = iter(
        torch.autograd.grad(again, needed, grad, create_graph=create_graph) if needed else ()
    )
    by_input, by_weight, by_bias = (
        next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves
    )
    return [by_input, grad, by_weight, by_bias]


def _reference(
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
) -> tuple[Tensor, Tensor]:
    """Do what the operator does by operations that every transform of torch can follow."""
    # Replicas that follow each other in N become channels of their own.
    wide = input.unflatten(0, (replicas, -1)).movedim(0, 1).flatten(1, 2)
    if training:
        mean, var, _ = moments(wide)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    wide = normalize(wide, mean, var, weight, bias, eps)
    output = wide.unflatten(1, (replicas, -1)).movedim(1, 0).flatten(0, 1)
    if residual is not None:
        output = output + residual
    statistics = torch.stack([mean.detach().double(), var.detach().double()])
    return activate(output, activation, negative_slope), statistics


# ------------------------------------------------------------------------------ rules


def _autograd(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Record the operator for ordinary autograd; leave other derivatives to the reference."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return _reference(*arguments)
    below = keyset & torch._C._after_autograd_keyset

    def forward(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.normlab.batch_norm.default.redispatch(below, *arguments)

    if not torch.is_grad_enabled() or not _needs_grad(*arguments[:4]):
        return forward(*arguments)
    return _BatchNorm.apply(forward, torch.ops.normlab.batch_norm_backward, *arguments)


_library.impl("batch_norm", _autograd, "Autograd", with_keyset=True)


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, replicas = rest
    output = torch.empty_like(input, memory_format=native.memory_format(input))
    return output, input.new_empty((2, replicas * input.shape[1]), dtype=torch.float64)


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 - an operator's signature
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, wanted = rest
    like_input = torch.empty_like(input, memory_format=native.memory_format(input))
    per_channel = (
        input.new_empty(
            statistics.shape[1] if want else 0,
            dtype=native.ARITHMETIC[input.dtype] if parameter is None else parameter.dtype,
        )
        for parameter, want in zip((weight, bias), wanted, strict=True)
    )
    residual = input.new_empty(0) if output is None else torch.empty_like(like_input)
    return like_input, residual, *per_channel


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """Turn the dimension that vmap goes along into replicas."""
    batch = info.batch_size

    def flat(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        front = argument.expand(batch, *argument.shape) if dim is None else argument.movedim(dim, 0)
        return front.flatten(0, 1)

    *rest, replicas = map(flat, arguments, in_dims)
    output, statistics = torch.ops.normlab.batch_norm(*rest, batch * replicas)
    return (output.unflatten(0, (batch, -1)), statistics.unflatten(1, (batch, -1))), (0, 1)


torch.library.register_fake("normlab::batch_norm", _fake, lib=_library)
torch.library.register_fake("normlab::batch_norm_backward", _fake_backward, lib=_library)
torch.library.register_vmap("normlab::batch_norm", _vmap, lib=_library)
