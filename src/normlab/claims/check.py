"""Claims on request: measured where that is missing, read otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from normlab import study as studies
from normlab.claims.catalog import CLAIMS
from normlab.claims.claim import Claim
from normlab.claims.ledger import Ledger
from normlab.claims.result import Result
from normlab.claims.work import Work
from normlab.errors import InputError, did_you_mean

__all__ = ["FOLDER", "check", "find", "last"]

FOLDER = Path("runs") / "claims"
"""Where claims are kept if no folder is named."""


def find(name: str) -> Claim:
    """Return a claim by its name.

    Raises:
        InputError: There is none.
    """
    if name not in CLAIMS:
        raise InputError(
            f"unknown claim {name!r}{did_you_mean(name, CLAIMS)}: known are {', '.join(CLAIMS)}"
        )
    return CLAIMS[name]


def check(
    name: str,
    *,
    quick: bool = False,
    out: str | Path = FOLDER,
    workers: int = 1,
    watcher: Callable[[studies.Study], AbstractContextManager[studies.Watcher]] | None = None,
    seen: Callable[[int, int], None] | None = None,
) -> Result:
    """Test a claim on real data: measure the seeds that its ledger lacks, and say what came of it.

    Args:
        name: Of the claim: a key of `CLAIMS`.
        quick: Use fewer steps; such results are kept apart, and say that they are.
        out: Folder for the ledger and what is trained on the way. Called again with it, this goes
            on where it stopped.
        workers: Processes to train in; the numbers do not depend on it.
        watcher: Makes what follows the training of a study, if the claim needs one.
        seen: Told how many seeds are measured, and of how many.

    Returns:
        The numbers, the evidence and the verdict.

    Raises:
        InputError: There is no such claim, or the folder cannot be used.
        LedgerError: The ledger is damaged, or the disk is full.

    >>> import tempfile
    >>> check("identity", out=tempfile.mkdtemp()).verdict
    'supported'
    """
    claim = find(name)
    quick = quick and not claim.is_cheap
    with Ledger.write(Path(out)) as ledger:
        done = ledger.kept(claim, quick)
        missing = tuple(seed for seed in claim.seeds if seed not in done)
        if missing:
            total = len(claim.seeds)
            work = Work(missing, quick, Path(out), workers, watcher)
            started = time.perf_counter()
            for k, (seed, rows) in enumerate(claim.measure(work), total - len(missing) + 1):
                now = time.perf_counter()
                ledger.keep(claim, quick, seed, rows, now - started)
                started = now
                if seen:
                    seen(k, total)
        return Result(claim, quick, ledger.kept(claim, quick))


def last(names: Sequence[str] = (), *, out: str | Path = FOLDER) -> list[Result]:
    """Return what is kept of claims, of the full run if there is anything of it.

    Args:
        names: Of claims; all of them if none are given.
        out: The folder that `check` was given.
    """
    claims = [find(name) for name in names] or list(CLAIMS.values())
    with Ledger.read(Path(out)) as ledger:
        if ledger is None:
            return [Result(claim, False, {}) for claim in claims]
        results = []
        for claim in claims:
            full, quick = (ledger.kept(claim, is_quick) for is_quick in (False, True))
            results.append(Result(claim, bool(quick and not full), full or quick))
        return results
