"""A traced pass as a list of instructions that the kernels run.

Replaying a trace costs some microseconds an operation, and compiling it half a minute. The passes
of small networks consist of few kinds of operations; for these there are kernels
(`kernels/steps.cpp`), and between them nothing is left to do.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normlab.kernels import BUILT
from normlab.training.lowering.arithmetic import ARITHMETIC
from normlab.training.lowering.ends import ENDS
from normlab.training.lowering.images import IMAGES
from normlab.training.lowering.normalization import NORMALIZATION
from normlab.training.lowering.writer import Handler, Value, Writer
from normlab.training.steps import NotLoweredError, Steps

__all__ = ["lower"]

aten = torch.ops.aten

_HANDLERS: dict[Any, Handler] = {
    operator.getitem: lambda writer, _, source, i: writer.values[source][i],
    **ENDS,
    **ARITHMETIC,
    **NORMALIZATION,
    **IMAGES,
}

_WITH_OPTIONS = {aten._to_copy.default, aten.ones_like.default}
"""Operations whose named arguments are looked at, or of no consequence."""


def lower(graph: fx.Graph, tensors: Sequence[Tensor]) -> Steps:
    """Return the pass of one replica as instructions.

    Args:
        graph: Of operations of aten, whose nodes know their shapes.
        tensors: Examples of its arguments, laid out as all of them will be.

    Raises:
        NotLoweredError: There is no kernel for something in it.
    """
    if not BUILT:
        raise NotLoweredError("the kernels are not built")
    writer, places = Writer(tensors), iter(range(len(tensors)))
    if writer.dtype not in (torch.float32, torch.float64):
        raise NotLoweredError(f"there are no kernels for {writer.dtype}")
    for node in graph.nodes:
        if node in writer.values:
            continue  # Done along with one before it.
        if node.op == "placeholder":
            writer.values[node] = _argument(writer, next(places))
        elif node.op == "call_function":
            writer.values[node] = _call(writer, node)
    *numbers, hits = next(reversed(graph.nodes)).args[0]
    outputs = [*map(writer.value, numbers), writer.value(hits, dtype=torch.int64)]
    if any(each.place < len(tensors) for each in outputs):
        raise NotLoweredError("an argument is handed back")
    made = [
        (each.place, writer.work[each.place - len(tensors)].view(each.shape)) for each in outputs
    ]
    return Steps(writer.instructions, writer.work, made, writer.dtype)


def _call(writer: Writer, node: fx.Node) -> Any:
    if node.target not in _HANDLERS:
        raise NotLoweredError(f"there is no kernel for {node.target}")
    if node.kwargs and node.target not in _WITH_OPTIONS:
        raise NotLoweredError(f"there is no kernel for {node} with {node.kwargs}")
    try:
        made = _HANDLERS[node.target](writer, node, *node.args)
    except (KeyError, TypeError, ValueError) as error:  # Arguments of another kind or number.
        raise NotLoweredError(f"there is no kernel for {node.format_node()}") from error
    if isinstance(made, Value) and node.target != aten.index.Tensor:
        wanted = node.meta["val"]
        if (made.shape, made.dtype) != (tuple(wanted.shape), wanted.dtype):
            raise NotLoweredError(f"there is no kernel for {node.format_node()}")
    return made


def _argument(writer: Writer, place: int) -> Value:
    tensor = writer.tensors[place]
    if tensor.device.type != "cpu":
        raise NotLoweredError(f"argument {place} is on the device {tensor.device}")
    if not tensor.is_contiguous():
        raise NotLoweredError(f"argument {place} does not lie in memory in rows")
    return Value(place, tuple(tensor.shape), tensor.dtype)
