"""What the parts of the lowering write to: values and their places, and instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from normlab.training.steps import OPERATIONS, Instruction, NotLoweredError

__all__ = ["Handler", "Opaque", "Value", "Writer"]

Handler = Callable[..., Any]
"""Writes an operation down, given the writer, the node and the node's arguments; returns where its
result is."""


class Value(NamedTuple):
    """Where a tensor of the graph is.

    Attributes:
        place: Of its pointer.
        shape: As the graph has it.
        dtype: The same.
        turned: It lies in memory transposed.
    """

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class Opaque(NamedTuple):
    """What a kernel keeps for its backward pass, in a form of its own."""

    value: Value


class Writer:
    """Keeps what has been written down of a pass.

    Args:
        tensors: Examples of the pass's arguments.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.dtype = next(each.dtype for each in tensors if each.is_floating_point())
        self.instructions: list[Instruction] = []
        self.work: list[Tensor] = []
        self.values: dict[fx.Node, Any] = {}
        self.labels: dict[int, Tensor] = {}
        """All of those that a value is gathered from, by its place."""

    def value(
        self,
        node: Any,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        *,
        turned: bool = False,
    ) -> Value:
        """Return the value of a node.

        Args:
            node: Which.
            shape: What it must be, if given.
            dtype: The same; the network's if not given.
            turned: Whether it may lie in memory transposed.
        """
        value = self.values[node]
        if not isinstance(value, Value) or (value.turned and not turned):
            raise NotLoweredError(f"{node} does not lie in memory in rows")
        if value.dtype != (dtype or self.dtype) or (
            shape is not None and value.shape != tuple(shape)
        ):
            raise NotLoweredError(f"{node} is {value.dtype} of shape {value.shape}")
        return value

    def optional(self, node: Any, *shape: int) -> Value | None:
        """Return the value of a node that may be missing."""
        return None if node is None else self.value(node, shape)

    def kept(self, node: Any) -> Value:
        """Return what a kernel kept for its backward pass."""
        opaque = self.values[node]
        if not isinstance(opaque, Opaque):
            raise NotLoweredError(f"{node} was not kept by a kernel")
        return opaque.value

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> Value:
        """Return a new value, zero for now."""
        return self.place(torch.zeros(shape, dtype=dtype or self.dtype))

    def place(self, tensor: Tensor) -> Value:
        """Return a value that lies in a tensor's memory."""
        self.work.append(tensor)
        place = len(self.tensors) + len(self.work) - 1
        return Value(place, tuple(tensor.shape), tensor.dtype)

    def write(
        self,
        operation: str,
        operands: Sequence[Value | None],
        sizes: Sequence[int],
        numbers: Sequence[float] = (),
    ) -> None:
        """Add an instruction."""
        instruction = Instruction(OPERATIONS.index(operation))
        for i, each in enumerate(operands):
            instruction.operands[i] = -1 if each is None else each.place
        instruction.sizes[: len(sizes)] = sizes
        instruction.numbers[: len(numbers)] = numbers
        self.instructions.append(instruction)
