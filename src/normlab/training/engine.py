"""Runs replicas, in this process or in several, and yields what they measure."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from normlab.data import Splits, load, split
from normlab.errors import NormlabError
from normlab.networks import build_network
from normlab.training.loop import train
from normlab.training.recipe import Measurement, Outcome, Recipe, Replica

__all__ = ["run_replicas"]


def run_replicas(
    recipe: Recipe, replicas: Sequence[Replica], workers: int = 1
) -> Generator[Measurement | Outcome, None, None]:
    """Train replicas and yield every measurement and outcome as it comes.

    Each replica runs on one thread, whatever the number of workers, so that its numbers do not
    depend on it. Closing the iterator stops the work.

    Args:
        recipe: What they have in common.
        replicas: Which to train.
        workers: Processes to train in; with 1, this process.

    Raises:
        NormlabError: A worker process died.
    """
    if workers == 1 or len(replicas) < 2:
        with _one_thread():
            for replica in replicas:
                yield from _train(recipe, replica, _splits(recipe))
    else:
        yield from _run_in_processes(recipe, replicas, min(workers, len(replicas)))


def _splits(recipe: Recipe) -> Splits:
    return split(load(recipe.dataset), recipe.validation)


def _train(recipe: Recipe, replica: Replica, splits: Splits) -> Iterator[Measurement | Outcome]:
    network = build_network(
        recipe.network,
        replica.arm,
        replica.seed,
        image_shape=splits.dataset.image_shape,
        classes=splits.dataset.classes,
        activation=recipe.activation,
        init=recipe.init,
    )
    return train(network, replica, recipe, splits)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, and leave torch's setting as it was found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_in_processes(
    recipe: Recipe, replicas: Sequence[Replica], workers: int
) -> Iterator[Measurement | Outcome]:
    # Spawned, because a forked child of a process that has used torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    executor = ProcessPoolExecutor(workers, context, _start_worker, (recipe, events))
    try:
        with _workers_ignore_ctrl_c():
            for replica in replicas:
                executor.submit(_work, replica)
        unfinished = len(replicas)
        while unfinished:
            try:
                event = events.get(timeout=0.5)
            except queue.Empty:
                pass
            else:
                if isinstance(event, Exception):
                    raise event
                unfinished -= isinstance(event, Outcome)
                yield event
            _check_that_workers_live(executor)
    finally:
        for process in _processes(executor):
            process.terminate()
        executor.shutdown(cancel_futures=True)


@contextmanager
def _workers_ignore_ctrl_c() -> Iterator[None]:
    """Let the processes that start meanwhile ignore Ctrl-C: their parent hears it and ends them.

    A worker could only say so itself after it has imported torch, which takes seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers, and only it hears Ctrl-C.
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _check_that_workers_live(executor: ProcessPoolExecutor) -> None:
    """Look at the processes themselves.

    The pool does not watch the worker that it started last until a replica is through, and its
    futures are not asked: a Ctrl-C inside one would leave its lock taken, and the pool waiting.
    """
    processes = _processes(executor)
    if not processes or any(process.exitcode is not None for process in processes):
        raise NormlabError(
            "a worker process died, perhaps for want of memory: what was measured is kept; "
            "run the same command again, with --workers 1 if it happens again"
        )


def _processes(executor: ProcessPoolExecutor) -> list[Any]:
    return list((executor._processes or {}).values())


_worker: dict[str, Any] = {}
"""What a worker process keeps between replicas."""


def _start_worker(recipe: Recipe, events: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.update(recipe=recipe, events=events, splits=_splits(recipe))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(replica: Replica) -> None:
    events = _worker["events"]
    try:
        for event in _train(_worker["recipe"], replica, _worker["splits"]):
            events.put(event)
    except NormlabError as error:
        events.put(error)
    except Exception:
        events.put(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
