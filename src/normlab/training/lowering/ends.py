"""The ends of a pass: a batch is gathered, and a loss made of what the network says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normlab.training.lowering.writer import Handler, Value, Writer
from normlab.training.steps import NotLoweredError

__all__ = ["ENDS"]

aten = torch.ops.aten


_LABELS = 1
"""The place of the labels among a pass's arguments."""


def _gather(writer: Writer, node: fx.Node, source: Any, indices: Any) -> Value:
    rows = writer.values[source]
    (at,) = (writer.value(each, dtype=torch.int64) for each in indices)
    if rows.place > _LABELS or at.place != len(writer.tensors) - 1:
        raise NotLoweredError(f"there is no kernel for {node}: only the data are gathered")
    if rows.dtype == torch.int64 and len(rows.shape) == len(at.shape) == 1:
        labels = writer.make(*at.shape, dtype=torch.int64)
        writer.labels[labels.place] = writer.tensors[rows.place]
        writer.write("labels", [rows, at, labels], at.shape)
        return labels
    if rows.dtype != torch.uint8 or len(at.shape) != 1:
        raise NotLoweredError(f"there is no kernel for {node} of {rows.dtype}")
    # What follows makes numbers of the bytes and scales them: it is done along with this.
    factor, offset, chain = 1.0, 0.0, [node]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        number: Any = user.args[1] if len(user.args) == 2 else None
        converts = user.target is aten._to_copy.default and set(user.kwargs) == {"dtype"}
        scales = isinstance(number, float) and not user.kwargs
        if user.target is aten.mul_.Tensor and scales and not offset:
            factor *= number
        elif user.target is aten.add_.Tensor and scales:
            offset += number
        elif not converts or user.kwargs["dtype"] not in (torch.float32, writer.dtype):
            break
        chain.append(user)
    images = writer.make(at.shape[0], *rows.shape[1:])
    if chain[-1].meta["val"].dtype != writer.dtype:
        raise NotLoweredError("the images do not become numbers of the network's type")
    sizes = [at.shape[0], math.prod(rows.shape[1:])]
    writer.write("gather", [rows, at, images], sizes, [factor, offset])
    writer.values |= dict.fromkeys(chain, images)
    return images


def _log_softmax(writer: Writer, node: fx.Node, x: Any, dim: int, _: bool) -> Value:
    value = writer.value(x)
    if len(value.shape) != 2 or dim not in (1, -1):
        raise NotLoweredError(f"there is no kernel for {node} along {dim}")
    out = writer.make(*value.shape)
    writer.write("log softmax", [value, out], value.shape)
    return out


def _log_softmax_backward(writer: Writer, node: fx.Node, grad: Any, y: Any, *_: Any) -> Value:
    del node
    value = writer.value(y)
    out = writer.make(*value.shape)
    writer.write("log softmax backward", [writer.value(grad, value.shape), value, out], value.shape)
    return out


def _nll(writer: Writer, node: fx.Node, x: Any, y: Any, *options: Any) -> Any:
    value, out = writer.value(x), writer.make()
    labels = writer.value(y, dtype=torch.int64)
    if len(value.shape) != 2 or options[:2] != (None, 1):
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    if labels.place != _LABELS:  # These are the caller's to check.
        least, most = writer.labels[labels.place].aminmax()
        if not 0 <= int(least) <= int(most) < value.shape[1]:
            raise NotLoweredError(
                f"labels reach from {least} to {most}, of {value.shape[1]} classes"
            )
    writer.write("nll", [value, labels, out], value.shape)
    return out, None


def _nll_backward(writer: Writer, node: fx.Node, grad: Any, x: Any, y: Any, *_: Any) -> Value:
    del node
    value = writer.value(x)
    out = writer.make(*value.shape)
    operands = [writer.value(grad), writer.value(y, dtype=torch.int64), out]
    writer.write("nll backward", operands, value.shape)
    return out


def _argmax(writer: Writer, node: fx.Node, x: Any, dim: Any = None) -> Value:
    value = writer.value(x)
    if len(value.shape) != 2 or dim not in (1, -1):
        raise NotLoweredError(f"there is no kernel for {node} along {dim}")
    out = writer.make(value.shape[0], dtype=torch.int64)
    writer.write("argmax", [value, out], value.shape)
    return out


def _equal(writer: Writer, node: fx.Node, a: Any, b: Any) -> Value:
    del node
    first = writer.value(a, dtype=torch.int64)
    out = writer.make(*first.shape, dtype=torch.bool)
    second = writer.value(b, first.shape, torch.int64)
    writer.write("equal", [first, second, out], [first.numel])
    return out


ENDS: dict[Any, Handler] = {
    aten.index.Tensor: _gather,
    aten.argmax.default: _argmax,
    aten.eq.Tensor: _equal,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
}
