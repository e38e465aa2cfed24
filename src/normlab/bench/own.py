"""normlab's own fleets, as peers of `normlab bench fleet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from normlab.bench.work import EVALUATED, Peer, Work
from normlab.data import Dataset, Splits
from normlab.processes import Workers
from normlab.training import Engine, Fleet, Recipe, Replica
from normlab.training.choice import choose, stack_size
from normlab.training.devices import compute_exactly
from normlab.training.engine import build_fleet, cuts

__all__ = ["SIZES", "own_fleets"]

SIZES = (1, 10, 50)
_STEPS = 100  # In a call, those of all replicas counted, and at least 20 of each.


def own_fleets() -> Mapping[str, Callable[[Work], Peer]]:
    """Return a peer for each size of fleet, trained as a study of ten epochs trains it."""
    return {f"normlab, fleet of {size}": partial(_peer, size) for size in SIZES}


def _peer(size: int, work: Work) -> Peer:
    team, images = _Team(work, size), min(EVALUATED, work.images)
    return Peer(team.train, team.steps * size, team.evaluate, images * size, team.close)


class _Team:
    """A fleet shared among as many processes as there are threads, one thread each.

    On another device than the CPU it is one process.
    """

    def __init__(self, work: Work, size: int) -> None:
        self.size, self.steps = size, max(20, _STEPS // size)
        count = min(size, torch.get_num_threads()) if work.device == "cpu" else 1
        self.pools = [Workers(1, _start, (work, size, worker, count)) for worker in range(count)]
        self._mean(_advance, 1)  # Tracing and compiling are not in the other peers' times either.

    def train(self) -> float:
        """Make steps with every replica, and return their mean loss."""
        return self._mean(_advance, self.steps)

    def evaluate(self) -> float:
        """Evaluate every replica, and return their mean loss."""
        return self._mean(_evaluate)

    def _mean(self, job: Callable[..., float], *arguments: int) -> float:
        answers = [pool.submit(job, *arguments) for pool in self.pools]
        return sum(answer.result() for answer in answers) / self.size

    def close(self) -> None:
        """End the processes."""
        for pool in self.pools:
            pool.close()


_here: dict[str, Any] = {}
"""What a worker keeps: its fleets, each of as many replicas as a study trains at a time."""


def _start(work: Work, size: int, worker: int, count: int) -> None:
    torch.set_num_threads(1)
    compute_exactly(torch.device(work.device))
    recipe = Recipe(
        network=work.network,
        activation=work.activation,
        init=work.init,
        optimizer=work.optimizer,
        batch_size=work.batch_size,
        scaling=work.scaling,
        validation=0,
        epochs=10,
    )
    images, labels = work.load()
    indices = torch.arange(len(images))
    parts = {"train": indices, "test": indices[:EVALUATED]}
    data = Dataset("benchmark", images, labels, len(images), classes=10)
    splits = Splits(data, parts).to(work.device)
    passes: dict[Any, Any] = {}

    def build(replicas: Sequence[Replica], engine: Engine) -> Fleet:
        return build_fleet(recipe, replicas, splits, engine, passes)

    choice = choose(recipe, splits, work.arm, "auto", size, build)
    replicas = [Replica(work.arm, work.lr, seed) for seed in range(worker, size, count)]
    stacks = -(-len(replicas) // stack_size(splits.dataset.images.device))
    units = [replicas[start:stop] for start, stop in cuts(len(replicas), stacks)]
    _here["fleets"] = [build(unit, choice.engine) for unit in units]


def _advance(steps: int) -> float:
    """Make steps with every replica of this process, and return the sum of their mean losses."""
    total = 0.0
    for fleet in _here["fleets"]:
        before = fleet.losses.sum()
        fleet.advance(fleet.step + steps)
        total += float(fleet.losses.sum() - before) / steps
    return total


def _evaluate() -> float:
    """Evaluate every replica of this process, and return the sum of their mean losses."""
    total = 0.0
    for fleet in _here["fleets"]:
        found = fleet.evaluate(range(len(fleet.replicas)), fleet.splits.indices["test"])
        total += sum(loss for loss, _ in found)
    return total
