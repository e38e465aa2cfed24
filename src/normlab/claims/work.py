"""What the measuring of a claim gets to work with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from normlab import study as studies

__all__ = ["Work"]


@dataclass(frozen=True)
class Work:
    """What is asked for, and where what is slow to make can be kept.

    Attributes:
        seeds: To be measured: those that are not yet.
        quick: Whether fewer steps will do.
        folder: For ledgers of studies and trained networks; other claims use them too.
        workers: Processes to train in.
        watcher: Makes what follows the training of a study; None for nobody.
    """

    seeds: tuple[int, ...]
    quick: bool
    folder: Path
    workers: int = 1
    watcher: Callable[[studies.Study], AbstractContextManager[studies.Watcher]] | None = None

    def compare(self, study: studies.Study) -> studies.Comparison:
        """Return a study's comparison, after training what its ledger lacks."""
        folder = self.folder / f"{study.name}-{study.fingerprint[:8]}"
        with self.watcher(study) if self.watcher else nullcontext() as watcher:
            studies.run(study, folder, workers=self.workers, watcher=watcher)
        return studies.Comparison(folder)
