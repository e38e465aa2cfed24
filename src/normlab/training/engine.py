"""Trains fleets, in this process or in several, and yields what they measure."""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normlab.data import Splits, load, split
from normlab.data.datasets import Dataset
from normlab.errors import NormlabError
from normlab.imports import is_function
from normlab.networks import parse_arm
from normlab.processes import SharedTensor, Workers
from normlab.training.choice import Choice, choose, stack_size
from normlab.training.devices import compute_exactly, exact_products, find_device
from normlab.training.fleet import Engine, Fleet
from normlab.training.networks import build, check_alike
from normlab.training.recipe import FleetEvent, Outcome, Recipe, Replica

__all__ = ["Event", "build_fleet", "cuts", "run_replicas"]

Event = Choice | FleetEvent

_LOOPED_UNIT = 3  # Replicas: enough to share what evaluation reads, few enough to share out evenly.


class Unit(NamedTuple):
    """What a worker trains at a time: a fleet or a part of it, and the place of its checkpoint."""

    replicas: tuple[Replica, ...]
    engine: Engine
    checkpoint: Path | None


def run_replicas(
    recipe: Recipe,
    replicas: Sequence[Replica],
    workers: int = 1,
    *,
    engine: str = "auto",
    chosen: Mapping[str, Choice] | None = None,
    finished: frozenset[Replica] = frozenset(),
    folder: Path | None = None,
    device: str = "cpu",
) -> Generator[Event, None, None]:
    """Train replicas and yield every choice, measurement and outcome as it comes.

    Each worker computes on one thread, so that numbers do not depend on how many there are. Closing
    the iterator stops the work. A worker that dies is replaced once, and its work done again.

    Args:
        recipe: What they have in common.
        replicas: All of the study.
        workers: Processes to train in; with 1, this process.
        engine: `looped`, `stacked`, or `auto` to time both for each arm.
        chosen: What was chosen for arms before.
        finished: Replicas that need no training, of which nothing is yielded.
        folder: Where checkpoints are kept; made if need be, and empty at the end.
        device: Where it is done, as torch names it.

    Raises:
        InputError: There is no such device.
        NormlabError: A second worker process died, or there is no room for a checkpoint.
    """
    fleets: dict[str, list[Replica]] = {}
    for replica in replicas:
        fleets.setdefault(replica.arm, []).append(replica)
    missing = [r for r in replicas if r not in finished]
    workers = max(1, min(workers, len(missing)))
    choices = dict(chosen or {})
    arms = dict.fromkeys(replica.arm for replica in missing)
    undecided = [(arm, engine, len(fleets[arm])) for arm in arms if arm not in choices]
    where = find_device(device)
    with _team(recipe, workers, where) as team:
        for choice in team.run(_choose, undecided):
            choices[choice.arm] = choice
            yield choice
        units = [
            unit
            for unit in _units(fleets, choices, workers, stack_size(where), folder)
            if not finished.issuperset(unit.replicas)
        ]
        if folder is not None:
            folder.mkdir(exist_ok=True)
        ended, told = set(finished), set[tuple[type, Replica, int]]()
        for event in team.run(_train, units):
            # What a checkpoint holds, or a new worker does again, has been told before.
            key = (type(event), event.replica, event.step)
            if key not in told and event.replica not in ended:
                told.add(key)
                if isinstance(event, Outcome):
                    ended.add(event.replica)
                yield event
    if folder is not None:
        shutil.rmtree(folder)


def _units(
    fleets: Mapping[str, Sequence[Replica]],
    choices: Mapping[str, Choice],
    workers: int,
    stack: int,
    folder: Path | None,
) -> list[Unit]:
    """Cut fleets into units of about equal size; the slowest come first, so that none is left over.

    A stack is cut in the same way whatever the workers and whatever is done already, because its
    numbers may depend, in their last bits, on its size.
    """
    units = []
    for number, (arm, fleet) in enumerate(fleets.items()):
        if arm not in choices:
            continue  # All of it is finished.
        if choices[arm].engine.kind == "stacked":
            parts = -(-len(fleet) // stack)
        else:
            enough = -(-workers // len(fleets))
            parts = max(-(-len(fleet) // _LOOPED_UNIT), min(enough, len(fleet)))
        units += [
            Unit(
                tuple(fleet[start:stop]),
                choices[arm].engine,
                folder / f"{number}-{start}-{stop}.safetensors" if folder else None,
            )
            for start, stop in cuts(len(fleet), parts)
        ]
    return sorted(units, key=lambda unit: -choices[unit.replicas[0].arm].cost)


def cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Return where parts of about equal size start and stop.

    >>> cuts(7, 2)
    [(0, 3), (3, 7)]
    """
    return list(pairwise(length * part // parts for part in range(parts + 1)))


def build_fleet(
    recipe: Recipe,
    replicas: Sequence[Replica],
    splits: Splits,
    engine: Engine,
    passes: dict[Any, Any],
) -> Fleet:
    """Return a fleet of a recipe's own network; arguments as for `Fleet`."""
    networks = [build(recipe, replica.arm, replica.seed, splits.dataset) for replica in replicas]
    if is_function(recipe.network):
        check_alike(recipe, networks, splits.dataset)
    precision = parse_arm(replicas[0].arm).precision
    return Fleet(networks, replicas, recipe, splits, engine, passes, precision)


# ------------------------------------------------------------------------- who does it


class _Bench:
    """What a process keeps between units: the data, and passes that were traced or compiled."""

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        self.recipe, self.splits = recipe, splits
        self.passes: dict[Any, Any] = {}


def _choose(bench: _Bench, arm: str, engine: str, fleet: int) -> Iterator[Choice]:
    def build(replicas: Sequence[Replica], engine: Engine) -> Fleet:
        return build_fleet(bench.recipe, replicas, bench.splits, engine, bench.passes)

    yield choose(bench.recipe, bench.splits, arm, engine, fleet, build)


def _train(bench: _Bench, *unit: Any) -> Iterator[FleetEvent]:
    replicas, engine, checkpoint = Unit(*unit)
    fleet = build_fleet(bench.recipe, replicas, bench.splits, engine, bench.passes)
    return fleet.train(checkpoint)


@contextmanager
def _team(recipe: Recipe, workers: int, device: torch.device) -> Iterator[_Alone | _Together]:
    splits = split(load(recipe.dataset), recipe.validation)
    if workers > 1:
        with _Together(recipe, splits, workers, device) as team:
            yield team
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exact_products(device):
            yield _Alone(_Bench(recipe, splits.to(device)))
    finally:
        torch.set_num_threads(threads)


class _Alone:
    """Does jobs here, one after the other."""

    def __init__(self, bench: _Bench) -> None:
        self.bench = bench

    def run(self, job: Any, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the events of a job for every item."""
        for item in items:
            yield from job(self.bench, *item)


class _Together:
    """Does jobs in worker processes."""

    def __init__(self, recipe: Recipe, splits: Splits, workers: int, device: torch.device) -> None:
        self.recipe, self.dataset, self.workers = recipe, splits.dataset, workers
        self.device = device
        try:
            self.images = SharedTensor(splits.dataset.images)
        except OSError as error:
            raise NormlabError(
                f"workers cannot share the images ({error.strerror}): run with --workers 1"
            ) from None
        self.deaths = 0
        self.pool: Workers | None = None

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        self.images.close()

    def run(self, job: Any, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the events of a job for every item, in the order in which they come."""
        waiting = dict(enumerate(items))
        while waiting:
            pool, events = self._open()
            for number, item in waiting.items():
                pool.submit(_work, job, number, item)
            while waiting and not self._has_lost_a_worker():
                try:
                    event = events.get(timeout=0.5)
                except queue.Empty:
                    continue
                if isinstance(event, int):
                    del waiting[event]
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event

    def _open(self) -> tuple[Workers, Any]:
        if self.pool is None:
            self.events = multiprocessing.get_context("spawn").Queue()
            rest = {**vars(self.dataset), "labels": self.dataset.labels.numpy()}
            del rest["images"]  # Of which workers see the one copy that is shared.
            start = (self.recipe, rest, self.images, self.device, self.events)
            self.pool = Workers(self.workers, _start_worker, start)
        return self.pool, self.events

    def _close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _has_lost_a_worker(self) -> bool:
        """Look at the processes themselves, and give up on the pool if one is gone.

        The pool does not watch the worker that it started last until it is through with an item,
        and its futures are not asked: a Ctrl-C inside one would leave its lock taken, and the pool
        waiting.
        """
        assert self.pool is not None
        processes = self.pool.processes()
        if processes and all(process.exitcode is None for process in processes):
            return False
        self.deaths += 1
        if self.deaths > 1:
            raise NormlabError(
                "two worker processes died, perhaps for want of memory: what was measured is kept; "
                "run the same command again, with --workers 1 if it happens again"
            )
        self._close()
        return True


_worker: dict[str, Any] = {}
"""What a worker process is given when it starts."""


def _start_worker(
    recipe: Recipe, rest: dict[str, Any], images: SharedTensor, device: torch.device, events: Any
) -> None:
    torch.set_num_threads(1)
    compute_exactly(device)
    labels = torch.from_numpy(rest.pop("labels"))
    dataset = Dataset(images=images.tensor, labels=labels, **rest)
    splits = split(dataset, recipe.validation).to(device)
    _worker.update(bench=_Bench(recipe, splits), events=events)


def _work(job: Any, number: int, item: tuple[Any, ...]) -> None:
    events = _worker["events"]
    try:
        for event in job(_worker["bench"], *item):
            events.put(event)
        events.put(number)
    except NormlabError as error:
        events.put(error)
    except Exception:
        events.put(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
