"""Steps of training recorded as graphs, where a device has them.

A step of a small network is some hundred operations that each take a GPU less time than Python
takes to ask for them. As a graph they are asked for at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["GRAPHS", "Graph", "Recorded"]

_WARM_UP = 3  # Steps: libraries choose their algorithms, and take their memory, in the first ones.


class Graph(Protocol):
    """What a device records operations in."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Do what is to be recorded, a few times, as the recording will."""

    def record(self, step: Callable[[], None]) -> None:
        """Record what is done, without doing it."""

    def replay(self) -> None:
        """Do what was recorded, on the memory that it was recorded on."""


class Recorded:
    """A step that is replayed.

    Args:
        step: Reads what it is given, and changes `moved` alone. All that it does it must do on the
            device, by tensors that stay where they are.
        fed: An example of what it is given: tensors that are others in every step.
        moved: What it changes; left as it was.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Tensor]], None],
        fed: Sequence[Tensor],
        moved: Sequence[Tensor],
    ) -> None:
        device = moved[0].device
        self._fed = [each.to(device, copy=True) for each in fed]
        self._graph = GRAPHS[device.type](device)
        before = [each.clone() for each in moved]
        self._graph.warm_up(lambda: step(self._fed))
        for each, value in zip(moved, before, strict=True):
            each.copy_(value)
        self._graph.record(lambda: step(self._fed))

    def __call__(self, fed: Sequence[Tensor]) -> None:
        """Take the step with these tensors."""
        for mine, given in zip(self._fed, fed, strict=True):
            mine.copy_(given)
        self._graph.replay()


class _CudaGraph:
    def __init__(self, device: torch.device) -> None:
        self._stream, self._graph = _aside(device), torch.cuda.CUDAGraph()

    def warm_up(self, step: Callable[[], None]) -> None:
        usual = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                step()
        usual.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> None:
        # The outer one is there to be left again if recording fails, when the inner one is not.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(self._graph, stream=self._stream),
        ):
            step()

    def replay(self) -> None:
        self._graph.replay()


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device that steps are recorded on.

    torch's own is of whichever device was the current one when it was first needed; and each stream
    has memory of cuBLAS for good.
    """
    return torch.cuda.Stream(device)


GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": _CudaGraph}
"""By the type of the device."""
