"""Steps of training recorded as graphs, where a device has them.

A step of a small network is some hundred operations that each take a GPU less time than Python
takes to ask for them. As a graph they are asked for at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    def warm_up(self, step: Callable[[], None]) -> None:
        # On a stream of its own, as torch's notes on CUDA graphs want it.
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, step: Callable[[], None]) -> None:
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": _CudaGraph}
"""By the type of the device."""
