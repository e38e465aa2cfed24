"""Products of matrices, sums, what is done to each value, and changes of shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from normlab.training.lowering.writer import Handler, Value, Writer
from normlab.training.steps import NotLoweredError

__all__ = ["ARITHMETIC"]

aten = torch.ops.aten


def _narrow(writer: Writer, node: fx.Node, source: Any) -> Value:
    value = writer.value(source, dtype=torch.float64)
    if node.kwargs != {"dtype": writer.dtype}:
        raise NotLoweredError(f"there is no kernel for {node}")
    narrow = writer.make(*value.shape)
    writer.write("narrow", [value, narrow], [value.numel])
    return narrow


def _reshape(writer: Writer, node: fx.Node, source: Any, *_: Any) -> Value:
    """Return a value in another shape."""
    value, shape = writer.value(source), tuple(node.meta["val"].shape)
    if math.prod(shape) != value.numel:
        raise NotLoweredError(f"there is no kernel for {node} of shape {value.shape}")
    return value._replace(shape=shape)


def _transpose(writer: Writer, node: fx.Node, source: Any) -> Value:
    value = writer.value(source, turned=True)
    return value._replace(shape=tuple(node.meta["val"].shape), turned=not value.turned)


def _one(writer: Writer, node: fx.Node, *_: Any) -> Value:
    if node.meta["val"].shape:
        raise NotLoweredError(f"there is no kernel for {node}")
    return writer.place(torch.ones((), dtype=writer.dtype))


def _product(writer: Writer, node: fx.Node, *operands: Any) -> Value:
    del node
    *bias, a, b = operands
    left, right = writer.value(a, turned=True), writer.value(b, turned=True)
    (m, k), (_, n) = left.shape, right.shape
    added = writer.value(bias[0], [n]) if bias else None
    out = writer.make(m, n)
    writer.write("product", [added, left, right, out], [m, n, k, left.turned, right.turned])
    return out


def _sum(writer: Writer, node: fx.Node, source: Any, dims: Any, *_: Any) -> Value:
    value = writer.value(source)
    if len(value.shape) != 2 or list(dims) != [0]:
        raise NotLoweredError(f"there is no kernel for {node} along {dims}")
    out = writer.make(*node.meta["val"].shape)
    writer.write("column sums", [value, out], value.shape)
    return out


def _sum_of_all(writer: Writer, node: fx.Node, source: Any) -> Value:
    if node.meta["val"].dtype == torch.int64:
        equal, count = writer.value(source, dtype=torch.bool), writer.make(dtype=torch.int64)
        writer.write("count equal", [equal, count], [equal.numel])
        return count
    value, out = writer.value(source), writer.make()
    writer.write("column sums", [value, out], [value.numel, 1])
    return out


def _elementwise(
    operation: str, tensors: int, takes: Callable[..., bool] = lambda *numbers: not numbers
) -> Callable[..., Value]:
    """Return what is done for an operation on tensors of one shape, and then the numbers it takes.

    The kernel is given the first of these.
    """

    def write(writer: Writer, node: fx.Node, *arguments: Any) -> Value:
        operands, numbers = arguments[:tensors], arguments[tensors:]
        if not takes(*numbers):
            raise NotLoweredError(f"there is no kernel for {node} with {arguments}")
        first = writer.value(operands[0])
        values = [writer.value(each, first.shape) for each in operands]
        out = writer.make(*first.shape)
        writer.write(
            operation, [*values, out], [first.numel], [float(each) for each in numbers[:1]]
        )
        return out

    return write


def _leaky_relu(writer: Writer, node: fx.Node, x: Any, slope: float = 0.01) -> Value:
    return _elementwise("leaky relu", 1, lambda _: True)(writer, node, x, slope)


def _multiply(writer: Writer, node: fx.Node, a: Any, b: Any) -> Value:
    if isinstance(b, fx.Node):
        return _elementwise("multiply", 2)(writer, node, a, b)
    value = writer.value(a, dtype=torch.float64)
    out = writer.make(*value.shape, dtype=torch.float64)
    writer.write("scale", [value, out], [value.numel], [b])
    return out


def _count(writer: Writer, node: fx.Node, counter: Any, by: Any) -> Value:
    value = writer.value(counter, dtype=torch.int64)
    if by != 1 or value.numel != 1:
        raise NotLoweredError(f"there is no kernel for {node}")
    writer.write("count", [value], [])
    return value


def _copy(writer: Writer, node: fx.Node, target: Any, source: Any) -> Value:
    del node
    to = writer.value(target)
    writer.write("copy", [writer.value(source, to.shape), to], [to.numel])
    return to


def _unbind(writer: Writer, node: fx.Node, source: Any) -> tuple[Value, ...]:
    """Take the rows of one of our own values apart."""
    value = writer.value(source, dtype=node.meta["val"][0].dtype)
    if value.place < len(writer.tensors):
        raise NotLoweredError(f"there is no kernel for {node}")
    tensor = writer.work[value.place - len(writer.tensors)].view(value.shape)
    return tuple(writer.place(row) for row in tensor)


ARITHMETIC: dict[Any, Handler] = {
    aten._to_copy.default: _narrow,
    aten.view.default: _reshape,
    aten.expand.default: _reshape,
    aten.sum.default: _sum_of_all,
    aten.t.default: _transpose,
    aten.ones_like.default: _one,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.sum.dim_IntList: _sum,
    aten.relu.default: _elementwise("relu", 1),
    aten.threshold_backward.default: _elementwise(
        "relu backward", 2, lambda threshold: threshold == 0
    ),
    aten.leaky_relu.default: _leaky_relu,
    aten.leaky_relu_backward.default: _elementwise(
        "leaky relu backward", 2, lambda slope, _: slope > 0
    ),
    aten.sigmoid.default: _elementwise("sigmoid", 1),
    aten.sigmoid_backward.default: _elementwise("sigmoid backward", 2),
    aten.tanh.default: _elementwise("tanh", 1),
    aten.tanh_backward.default: _elementwise("tanh backward", 2),
    aten.silu.default: _elementwise("silu", 1),
    aten.silu_backward.default: _elementwise("silu backward", 2),
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _elementwise("add", 2),
    aten.add_.Tensor: _count,
    aten.lerp.Scalar: _elementwise("lerp", 2, lambda _: True),
    aten.copy_.default: _copy,
    aten.unbind.int: _unbind,
}
