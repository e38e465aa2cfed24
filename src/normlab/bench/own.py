"""normlab's own fleets, as peers of `normlab bench fleet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from normlab.bench.fleet import Peer, Work
from normlab.data import Dataset, Splits
from normlab.processes import Workers
from normlab.training import Engine, Fleet, Recipe, Replica
from normlab.training.choice import STACK, choose
from normlab.training.engine import build_fleet

__all__ = ["SIZES", "own_fleets"]

SIZES = (1, 10, 50)
_STEPS = 20


def own_fleets() -> Mapping[str, Callable[[Work], Peer]]:
    """Return a peer for each size of fleet, trained as a study of ten epochs trains it."""
    return {f"normlab, fleet of {size}": partial(_peer, size) for size in SIZES}


def _peer(size: int, work: Work) -> Peer:
    return _Team(work, size), _STEPS * size


class _Team:
    """A fleet shared among as many processes as there are threads, one thread each."""

    def __init__(self, work: Work, size: int) -> None:
        self.size, count = size, min(size, torch.get_num_threads())
        self.pools = [Workers(1, _start, (work, size, worker, count)) for worker in range(count)]
        self._advance(1)  # Tracing and compiling are not in the other peers' times either.

    def __call__(self) -> float:
        return self._advance(_STEPS) / self.size / _STEPS

    def _advance(self, steps: int) -> float:
        answers = [pool.submit(_advance, steps) for pool in self.pools]
        return sum(answer.result() for answer in answers)

    def close(self) -> None:
        """End the processes."""
        for pool in self.pools:
            pool.close()


_here: dict[str, Any] = {}
"""What a worker keeps: its fleets, each of as many replicas as a study trains at a time."""


def _start(work: Work, size: int, worker: int, count: int) -> None:
    torch.set_num_threads(1)
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
    train = {"train": torch.arange(len(images))}
    splits = Splits(Dataset("benchmark", images, labels, len(images), classes=10), train)
    passes: dict[Any, Any] = {}

    def build(replicas: Sequence[Replica], engine: Engine) -> Fleet:
        return build_fleet(recipe, replicas, splits, engine, passes)

    choice = choose(recipe, splits, work.arm, "auto", size, build)
    replicas = [Replica(work.arm, work.lr, seed) for seed in range(worker, size, count)]
    parts = [replicas[start : start + STACK] for start in range(0, len(replicas), STACK)]
    _here["fleets"] = [build(part, choice.engine) for part in parts]


def _advance(steps: int) -> float:
    """Make steps with every replica of this process, and return their losses summed up."""
    total = 0.0
    for fleet in _here["fleets"]:
        before = fleet.losses.sum()
        per_epoch = fleet.steps_per_epoch
        if fleet.step % per_epoch + steps > per_epoch:
            fleet.step += per_epoch - fleet.step % per_epoch  # Into the next epoch.
        fleet.advance(fleet.step + steps)
        total += float(fleet.losses.sum() - before)
    return total
