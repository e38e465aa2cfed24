"""Steps of training as a list of instructions, which the kernels run in spans of steps."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normlab.kernels import kernel
from normlab.training.optimizers import BETAS, EPS, Optimizer

__all__ = ["OPERATIONS", "Instruction", "NotLoweredError", "Steps"]

OPERATIONS = (
    *("gather", "labels", "product", "column sums"),
    *("convolution", "convolution backward", "pool", "pool backward"),
    *("batch norm", "batch norm backward", "group norm", "group norm backward"),
    *("relu", "relu backward", "leaky relu", "leaky relu backward"),
    *("sigmoid", "sigmoid backward", "tanh", "tanh backward", "silu", "silu backward"),
    *("multiply", "add", "log softmax", "log softmax backward", "nll", "nll backward"),
    *("argmax", "equal", "count equal", "count", "narrow", "scale", "lerp", "copy"),
)
"""In the order of `Operation` in kernels/steps.cpp."""


class NotLoweredError(Exception):
    """A pass has an operation, or a layout, that there is no kernel for."""


class Instruction(ctypes.Structure):
    """An operation, the places of its operands, and what else it wants, as the kernels read it."""

    _fields_ = [
        ("operation", ctypes.c_int64),
        ("operands", ctypes.c_int64 * 8),
        ("sizes", ctypes.c_int64 * 9),
        ("numbers", ctypes.c_double * 3),
    ]


class _Feed(ctypes.Structure):
    _fields_ = [("place", ctypes.c_int64), ("bytes", ctypes.c_int64)]


_Places, _Pointers = ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p)


class _Update(ctypes.Structure):
    _fields_ = [
        ("adam", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("lr", "momentum", "beta1", "beta2", "eps", "decay")),
        *(("count", ctypes.c_int64), ("sizes", _Places), ("gradients", _Places)),
        *((name, _Pointers) for name in ("parameters", "first", "second")),
        ("step", ctypes.c_void_p),
    ]


class Steps:
    """A lowered pass. Called as other passes are, it returns loss, gradients and hits.

    Args:
        instructions: What a step does.
        work: What lies between the instructions; their places follow those of the arguments.
        outputs: Loss, gradients and hits: their places and tensors.
        dtype: Of the network.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        work: Sequence[Tensor],
        outputs: Sequence[tuple[int, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self._program = (Instruction * len(instructions))(*instructions)
        self._work, self._results = work, [tensor for _, tensor in outputs]
        (self._loss, _), *gradients, (self._hits, _) = outputs
        self._gradients = (ctypes.c_int64 * len(gradients))(*(place for place, _ in gradients))
        self._wide = dtype == torch.float64
        self._lock = threading.Lock()  # What lies between instructions is there once.

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the pass once."""
        with self._lock:
            self._run(tensors, [], 1, None)
            return [each.clone() for each in self._results]

    def train(
        self,
        state: Sequence[Tensor],
        fed: Sequence[Tensor],
        optimizer: Optimizer,
        replica: int,
        losses: float = 0.0,
    ) -> tuple[float, int]:
        """Take steps with a replica; return the sums of their losses and of their hits.

        Args:
            state: The arguments that stay: images, labels, parameters and buffers.
            fed: Those that are others in every step, stacked: dropout masks and indices.
            optimizer: Has the parameters, and moves them.
            replica: Which of its.
            losses: The sum so far, to which theirs are added one by one.
        """
        columns, recipe = optimizer.columns(replica), optimizer.recipe
        setting = optimizer.settings[replica]
        moments = [_pointers(each) for each in columns.moments]
        sizes = [each.numel() for each in columns.parameters]
        update = _Update(
            recipe.optimizer == "adam",
            setting.lr,
            recipe.momentum,
            *(*BETAS, EPS),
            setting.weight_decay,
            len(sizes),
            (ctypes.c_int64 * len(sizes))(*sizes),
            self._gradients,
            _pointers(columns.parameters),
            *(*moments, None, None)[:2],
            columns.steps[0].data_ptr(),
        )
        with self._lock:
            return self._run([*state, *fed], fed, len(fed[-1]), update, losses)

    def _run(
        self,
        arguments: Sequence[Tensor],
        fed: Sequence[Tensor],
        steps: int,
        update: _Update | None,
        losses: float = 0.0,
    ) -> tuple[float, int]:
        first = len(arguments) - len(fed)
        feeds = [_Feed(first + i, each[0].nbytes) for i, each in enumerate(fed)]
        loss, hits = ctypes.c_double(losses), ctypes.c_int64()
        _take_steps()(
            self._program,
            len(self._program),
            _pointers([*arguments, *self._work]),
            (_Feed * len(feeds))(*feeds),
            len(feeds),
            steps,
            self._loss,
            self._hits,
            None if update is None else ctypes.byref(update),
            self._wide,
            ctypes.byref(loss),
            ctypes.byref(hits),
        )
        return loss.value, hits.value


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


@lru_cache(maxsize=1)
def _take_steps() -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, size, pointer, pointer, *[size] * 4, pointer, ctypes.c_int]
    return kernel("normlab_take_steps", [*arguments, pointer, pointer])
