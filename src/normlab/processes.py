"""Worker processes: spawned, deaf to Ctrl-C, gone when their parent is."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import reduction
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SharedTensor", "Workers"]


class Workers(ProcessPoolExecutor):
    """A pool of processes that leaves nothing behind.

    They are spawned, because a forked child of a process that has used torch's threads can hang. As
    a context manager it ends them with the block.

    Args:
        count: Processes.
        initializer: Called first in each.
        initargs: Its arguments.

    >>> with Workers(1) as workers:
    ...     workers.submit(pow, 2, 5).result()
    32
    """

    def __init__(
        self,
        count: int,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        super().__init__(count, self.context, _start, (initializer, initargs))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Let a process call a function; this may start one."""
        with _deaf_to_ctrl_c():
            return super().submit(fn, *args, **kwargs)

    def processes(self) -> list[Any]:
        """Return those that have been started."""
        return list((self._processes or {}).values())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes at once, whatever they are at."""
        for process in self.processes():
            process.terminate()
        self.shutdown(cancel_futures=True)


class SharedTensor:
    """A tensor that worker processes see, and do not copy, when they are started with it.

    Args:
        tensor: Copied once into memory that belongs to no file.
    """

    def __init__(self, tensor: Tensor) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("normlab")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, max(1, tensor.numel() * tensor.element_size()))
        self.tensor = self._map(tensor.dtype, tensor.shape).copy_(tensor)

    def _map(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return torch.frombuffer(mmap.mmap(self._file, 0), dtype=dtype)[: shape.numel()].view(shape)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file), self.tensor.dtype, self.tensor.shape

    def __setstate__(self, state: Any) -> None:
        file, dtype, shape = state
        self._file = file.detach()
        self.tensor = self._map(dtype, shape)

    def close(self) -> None:
        """Let go of the memory, when its last tensor does."""
        os.close(self._file)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let the processes that start meanwhile ignore Ctrl-C: their parent hears it and ends them.

    A process could only say so itself after it has imported torch, which takes seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers, and only it hears Ctrl-C.
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_freed_memory()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step, which else pays for every page again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # Another C library, with ways of its own.
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
