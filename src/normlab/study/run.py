"""Runs what a study declares and its ledger does not hold yet."""

from __future__ import annotations

import hashlib
import time
from contextlib import closing
from pathlib import Path
from typing import Protocol

from normlab.data import load, split
from normlab.errors import InputError
from normlab.imports import is_function
from normlab.study.declaration import Study
from normlab.study.ledger import Ledger
from normlab.training import Event, run_replicas
from normlab.training.choice import check_engine
from normlab.training.devices import find_device, name_of
from normlab.training.networks import digest, layers

__all__ = ["Watcher", "run"]


class Watcher(Protocol):
    """Follows a run, to show it to somebody."""

    def begin(self, done: int, total: int) -> None:
        """Hear how many replicas the ledger holds, and of how many, before the first is trained."""

    def __call__(self, event: Event) -> None:
        """Hear of an event, after it is kept."""


def run(
    study: Study,
    folder: Path,
    *,
    workers: int = 1,
    engine: str = "auto",
    device: str = "cpu",
    watcher: Watcher | None = None,
) -> None:
    """Train the replicas that are missing in a folder's ledger.

    Args:
        study: What to run.
        folder: Made if it is not there.
        workers: Processes to train in.
        engine: `looped`, `stacked`, or `auto` to time both; an arm that the ledger has an engine of
            goes on with that.
        device: Where it is trained, as torch names it.
        watcher: Told how things go.

    Raises:
        InputError: The study cannot be run on its data, or the folder cannot be used.
        LedgerError: The ledger is damaged, or the disk is full.
        NormlabError: A worker process died.
    """
    if workers < 1:
        raise InputError(f"workers={workers}: at least 1 is needed")
    check_engine(engine)
    where = find_device(device)
    dataset = load(study.dataset)
    networks = study.check_against(split(dataset, study.validation))
    own = {} if dataset.digest is None else {"dataset": dataset.digest}
    if is_function(study.network):
        digests = " ".join(map(digest, networks.values()))
        own["network"] = hashlib.sha256(digests.encode()).hexdigest()
    with Ledger.write(folder, study, own) as ledger:
        finished = frozenset(ledger.finished())
        missing = len(study.replicas) - len(finished)
        if watcher:
            watcher.begin(len(finished), len(study.replicas))
        if not missing:
            return
        ledger.begin_session(min(workers, missing), name_of(where))
        for arm, network in networks.items():
            ledger.describe(arm, layers(network, dataset.image_shape))
        started = time.perf_counter()
        events = run_replicas(
            study,
            study.replicas,
            workers,
            engine=engine,
            device=str(where),
            chosen=ledger.choices(),
            finished=finished,
            folder=folder / "checkpoints",
        )
        with closing(events):
            for event in events:
                ledger.add(event, time.perf_counter() - started)
                if watcher:
                    watcher(event)
