"""Batch norm by either operator, layer norm and group norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from normlab.kernels import ACTIVATIONS
from normlab.training.lowering.writer import Handler, Opaque, Value, Writer
from normlab.training.steps import NotLoweredError

__all__ = ["NORMALIZATION"]

aten = torch.ops.aten


def _stock_batch_norm(
    writer: Writer, node: fx.Node, x: Any, w: Any, b: Any, mean: Any, var: Any, *options: Any
) -> Any:
    training, momentum, eps = options
    if not training:
        raise NotLoweredError(f"{node} does not use the batch's statistics")
    out, statistics = _batch_norm(writer, x, w, b, [mean, var], [momentum, eps])
    return out, Opaque(statistics), Opaque(statistics)


def _own_batch_norm(
    writer: Writer, node: fx.Node, x: Any, residual: Any, w: Any, b: Any, *options: Any
) -> Any:
    _, _, eps, activation, slope, training, replicas = options
    if residual is not None or not training or replicas != 1:
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    return _batch_norm(writer, x, w, b, [None, None], [0.0, eps, slope], ACTIVATIONS[activation])


def _batch_norm(
    writer: Writer,
    x: Any,
    w: Any,
    b: Any,
    running: Sequence[Any],
    numbers: Sequence[float],
    activation: int = 0,
) -> tuple[Value, Value]:
    value = writer.value(x)
    samples, channels, spatial = _axes(value)
    moved = [writer.optional(each, channels) for each in (w, b, *running)]
    out = writer.make(*value.shape)
    statistics = writer.make(2, channels, dtype=torch.float64)
    sizes = [samples, channels, spatial, activation]
    writer.write("batch norm", [value, *moved, out, statistics], sizes, numbers)
    return out, statistics


def _stock_batch_norm_backward(
    writer: Writer, node: fx.Node, grad: Any, x: Any, w: Any, *rest: Any
) -> Any:
    *_, statistics, _, training, eps, _ = rest
    if not training:
        raise NotLoweredError(f"{node} does not use the batch's statistics")
    return _batch_norm_backward(writer, grad, x, w, None, writer.kept(statistics), [0.0, eps])


def _own_batch_norm_backward(
    writer: Writer, node: fx.Node, grad: Any, x: Any, y: Any, w: Any, b: Any, *rest: Any
) -> Any:
    statistics, eps, activation, slope, training, replicas, _ = rest
    if y is not None or not training or replicas != 1:
        raise NotLoweredError(f"there is no kernel for {node} with {rest}")
    kept = writer.value(statistics, dtype=torch.float64)
    numbers, number = [0.0, eps, slope], ACTIVATIONS[activation]
    by_x, by_w, by_b = _batch_norm_backward(writer, grad, x, w, b, kept, numbers, number)
    return by_x, None, by_w, by_b


def _batch_norm_backward(
    writer: Writer,
    grad: Any,
    x: Any,
    w: Any,
    b: Any,
    statistics: Value,
    numbers: Sequence[float],
    activation: int = 0,
) -> tuple[Value, Value, Value]:
    value = writer.value(x)
    samples, channels, spatial = _axes(value)
    by_x, by_w, by_b = writer.make(*value.shape), writer.make(channels), writer.make(channels)
    weight, bias = writer.optional(w, channels), writer.optional(b, channels)
    operands = [writer.value(grad, value.shape), value, weight, bias, statistics, by_x, by_w, by_b]
    sizes = [samples, channels, spatial, activation]
    writer.write("batch norm backward", operands, sizes, numbers)
    return by_x, by_w, by_b


def _layer_norm(
    writer: Writer, node: fx.Node, x: Any, shape: Any, w: Any, b: Any, eps: float
) -> Any:
    del node
    return _groups(writer, x, w, b, shape, _rows(writer.value(x), shape), eps)


def _layer_norm_backward(
    writer: Writer, node: fx.Node, grad: Any, x: Any, shape: Any, *rest: Any
) -> Any:
    del node
    statistics, _, w, *_ = rest
    rows = _rows(writer.value(x), shape)
    return _groups_backward(writer, grad, x, statistics, w, shape, rows)


def _group_norm(writer: Writer, node: fx.Node, x: Any, w: Any, b: Any, *options: Any) -> Any:
    del node
    samples, channels, spatial, groups, eps = options
    return _groups(writer, x, w, b, [channels], [samples, channels, groups, spatial], eps)


def _group_norm_backward(writer: Writer, node: fx.Node, grad: Any, x: Any, *rest: Any) -> Any:
    del node
    statistics, _, w, samples, channels, spatial, groups, _ = rest
    sizes = [samples, channels, groups, spatial]
    return _groups_backward(writer, grad, x, statistics, w, [channels], sizes)


def _groups(
    writer: Writer,
    x: Any,
    w: Any,
    b: Any,
    shape: Sequence[int],
    sizes: Sequence[int],
    eps: float,
) -> Any:
    value, (samples, _, groups, _) = writer.value(x), sizes
    out, statistics = writer.make(*value.shape), writer.make(2, samples * groups)
    operands = [value, writer.optional(w, *shape), writer.optional(b, *shape), out, statistics]
    writer.write("group norm", operands, sizes, [0.0, eps])
    return out, Opaque(statistics), Opaque(statistics)


def _groups_backward(
    writer: Writer,
    grad: Any,
    x: Any,
    statistics: Any,
    w: Any,
    shape: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Value, Value, Value]:
    value, kept = writer.value(x), writer.kept(statistics)
    by_x, by_w, by_b = writer.make(*value.shape), writer.make(*shape), writer.make(*shape)
    weight = writer.optional(w, *shape)
    operands = [writer.value(grad, value.shape), value, weight, kept, by_x, by_w, by_b]
    writer.write("group norm backward", operands, sizes)
    return by_x, by_w, by_b


def _axes(value: Value) -> tuple[int, int, int]:
    """Return how many samples and channels there are, and values of each channel in a sample."""
    samples, channels, *spatial = value.shape
    return samples, channels, math.prod(spatial)


def _rows(value: Value, shape: Sequence[int]) -> list[int]:
    """Return the sizes of a group norm that has each part of this shape for a sample."""
    columns = math.prod(shape)
    return [value.numel // columns, columns, 1, 1]


NORMALIZATION: dict[Any, Handler] = {
    aten.native_batch_norm.default: _stock_batch_norm,
    aten.native_batch_norm_backward.default: _stock_batch_norm_backward,
    torch.ops.normlab.batch_norm.default: _own_batch_norm,
    torch.ops.normlab.batch_norm_backward.default: _own_batch_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
