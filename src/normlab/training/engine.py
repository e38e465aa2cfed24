"""Runs replicas, in this process or in several, and yields what they measure."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from normlab.data import Splits, load, split
from normlab.errors import NormlabError
from normlab.networks import build_network
from normlab.processes import Workers
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
    events = multiprocessing.get_context("spawn").Queue()
    with Workers(workers, _start_worker, (recipe, events)) as pool:
        for replica in replicas:
            pool.submit(_work, replica)
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
            _check_that_workers_live(pool)


def _check_that_workers_live(pool: Workers) -> None:
    """Look at the processes themselves.

    The pool does not watch the worker that it started last until a replica is through, and its
    futures are not asked: a Ctrl-C inside one would leave its lock taken, and the pool waiting.
    """
    processes = pool.processes()
    if not processes or any(process.exitcode is not None for process in processes):
        raise NormlabError(
            "a worker process died, perhaps for want of memory: what was measured is kept; "
            "run the same command again, with --workers 1 if it happens again"
        )


_worker: dict[str, Any] = {}
"""What a worker process keeps between replicas."""


def _start_worker(recipe: Recipe, events: Any) -> None:
    torch.set_num_threads(1)
    _worker.update(recipe=recipe, events=events, splits=_splits(recipe))


def _work(replica: Replica) -> None:
    events = _worker["events"]
    try:
        for event in _train(_worker["recipe"], replica, _worker["splits"]):
            events.put(event)
    except NormlabError as error:
        events.put(error)
    except Exception:
        events.put(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
