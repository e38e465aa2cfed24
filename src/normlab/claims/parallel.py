"""The seeds of a claim, in as many processes as there are workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from typing import Any

import torch

from normlab.claims.claim import Row
from normlab.claims.work import Work
from normlab.processes import Workers

__all__ = ["share_out"]


def share_out(
    work: Work, job: Callable[..., list[Row]], *arguments: Any
) -> Iterator[tuple[int, list[Row]]]:
    """Do a job for every seed that is asked for, and yield each seed's rows as they come.

    Whatever the number of workers each job computes on one thread, for sums over several round
    otherwise.

    Args:
        work: Says which seeds, and how many processes; with one worker, this process.
        job: Called with the seed and the arguments; a function of a module, so that processes can
            be told of it.
        arguments: The same for every seed.
    """
    count = min(work.workers, len(work.seeds))
    if count <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for seed in work.seeds:
                yield seed, job(seed, *arguments)
        finally:
            torch.set_num_threads(threads)
        return
    with Workers(count, torch.set_num_threads, (1,)) as workers:
        seeds = {workers.submit(job, seed, *arguments): seed for seed in work.seeds}
        for done in as_completed(seeds):
            yield seeds[done], done.result()
