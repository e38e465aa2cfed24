"""Convolutions and poolings of images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normlab.training.lowering.writer import Handler, Opaque, Value, Writer
from normlab.training.steps import NotLoweredError

__all__ = ["IMAGES"]

aten = torch.ops.aten

_LARGEST = 2**20
"""Values of an image, with its channels, up to which it is convolved: the kernel lays up to sixteen
images side by side."""


def _convolution(
    writer: Writer, node: fx.Node, x: Any, weight: Any, bias: Any, *options: Any
) -> Value:
    value, window = writer.value(x), writer.value(weight)
    sizes = _sizes(node, value, window, *options)
    added = writer.optional(bias, window.shape[0])
    out = writer.make(*node.meta["val"].shape)
    writer.write("convolution", [value, window, added, out], sizes)
    return out


def _convolution_backward(
    writer: Writer, node: fx.Node, grad: Any, x: Any, weight: Any, *rest: Any
) -> Any:
    _, *options, (with_x, _, with_bias) = rest  # The sizes of the bias come first.
    value, window = writer.value(x), writer.value(weight)
    sizes = _sizes(node, value, window, *options)
    by_x = writer.make(*value.shape) if with_x else None
    by_weight = writer.make(*window.shape)
    by_bias = writer.make(window.shape[0]) if with_bias else None
    operands = [writer.value(grad), value, window, by_x, by_weight, by_bias]
    writer.write("convolution backward", operands, sizes)
    return by_x, by_weight, by_bias


def _sizes(node: fx.Node, x: Value, weight: Value, *options: Any) -> list[int]:
    """Return the sizes of a convolution, as `Convolution` in kernels.h has them."""
    stride, rims, dilation, is_transposed, _, groups = options
    out, inner, *window = weight.shape
    is_plain = {*stride, *dilation, groups} == {1} and not is_transposed
    fits = len(x.shape) == len(weight.shape) == 4 and x.shape[1] == inner
    if not (is_plain and fits and all(r < w for r, w in zip(rims, window, strict=True))):
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    if max(math.prod(x.shape[1:]), out * math.prod(x.shape[2:])) > _LARGEST:
        raise NotLoweredError(f"the images of {node} are too large")
    return [*x.shape, out, *window, *rims]


def _average_pool(writer: Writer, node: fx.Node, x: Any, *_: Any) -> Value:
    return _pool(writer, node, x, average=True)


def _average_pool_backward(writer: Writer, node: fx.Node, grad: Any, x: Any, *_: Any) -> Value:
    return _pool_backward(writer, node, grad, x, average=True)


def _max_pool(writer: Writer, node: fx.Node, x: Any, *_: Any) -> Any:
    # The backward pass finds again where the largest were.
    return _pool(writer, node, x, average=False), Opaque(writer.value(x))


def _max_pool_backward(writer: Writer, node: fx.Node, grad: Any, x: Any, *_: Any) -> Value:
    return _pool_backward(writer, node, grad, x, average=False)


def _pool(writer: Writer, node: fx.Node, x: Any, *, average: bool) -> Value:
    value = writer.value(x)
    sizes, shape = _windows(node, value)
    out = writer.make(*shape)
    writer.write("pool", [value, out], [average, *sizes])
    return out


def _pool_backward(writer: Writer, node: fx.Node, grad: Any, x: Any, *, average: bool) -> Value:
    value = writer.value(x)
    sizes, shape = _windows(node, value)
    by_x = writer.make(*value.shape)
    writer.write("pool backward", [writer.value(grad, shape), value, by_x], [average, *sizes])
    return by_x


def _windows(node: fx.Node, x: Value) -> tuple[list[int], tuple[int, ...]]:
    """Return the sizes of a pooling, as `Pooling` in kernels.h has them, and what it makes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    options: dict[str, Any] = {
        each.name: each.default_value for each in arguments if each.has_default_value()
    }
    options |= {each.name: value for each, value in zip(arguments, node.args, strict=False)}
    window = options["kernel_size"]
    if (
        len(x.shape) != 4
        or list(options["stride"] or window) != list(window)
        or any(options["padding"])
        or set(options.get("dilation", [1])) != {1}
        or options.get("divisor_override") is not None
    ):
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    height, width = x.shape[2:]
    shape = (*x.shape[:2], height // window[0], width // window[1])
    return [math.prod(x.shape[:2]), height, width, *window], shape


IMAGES: dict[Any, Handler] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
