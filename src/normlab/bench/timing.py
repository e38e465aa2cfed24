"""Timing by turns: every peer is measured in every round, because a machine's speed drifts."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["Timing", "machine", "take_turns", "versions"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over rounds, the quartiles, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


def take_turns(
    peers: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, least: int = 7
) -> dict[str, Timing]:
    """Call each peer in turn, round after round, and return how long a call takes.

    Where calls are short, each peer is called several times in a round, and all as often: the first
    call finds in the cache what the peer before it left there, which weighs less the more follow.

    Args:
        peers: What to call, by name; each is called three times beforehand, unmeasured.
        seconds: How long to go on.
        least: Rounds to make in any case.

    >>> timings = take_turns({"nothing": lambda: None}, seconds=0.0)
    >>> timings["nothing"].rounds
    7
    """
    took = []
    for call in peers.values():
        call()
        call()
        took.append(_seconds(call, 1))
    calls = max(1, min(50, int(1e-3 / max(min(took), 1e-9)), int(0.1 / max(*took, 1e-9))))
    measured: dict[str, list[float]] = {name: [] for name in peers}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(measured.values()))) < least:
        for name, call in peers.items():
            measured[name].append(_seconds(call, calls))
    return {name: _summarize(values) for name, values in measured.items()}


def _seconds(call: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _summarize(values: list[float]) -> Timing:
    low, _, high = statistics.quantiles(values, n=4)
    return Timing(statistics.median(values), low, high, len(values))


def versions() -> dict[str, str]:
    """Return what was measured."""
    return {
        "normlab": version("normlab"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def machine() -> str:
    """Return what it was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    vectors = torch.backends.cpu.get_cpu_capability()
    name = next(names, platform.machine())
    return f"{name}, {vectors}, {torch.get_num_threads()} threads, {platform.system()}"
