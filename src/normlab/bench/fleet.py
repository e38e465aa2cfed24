"""`normlab bench fleet`: what a training run costs, against the loops that people write.

Every peer trains the same network from the same first values on the same batches, with torch's own
layers. A call makes a span of steps in the middle of an epoch; the peers take turns at calls, and
what a call takes is scaled to seconds per replica and epoch. Each piece of work is measured in a
process of its own, whose C library keeps freed memory. The tutorials' loop gains from that where
its blocks are large (LeNet's are); it also gains the four batches of a turn's `2 * STEPS` that its
loader has ready. Both make it look faster than it is where it was written.

Measure on a machine that does nothing else. torch's threads wait for each other by spinning: with
one of two cores taken, small steps were seen to take a hundred times as long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

import pandas as pd
import torch

from normlab.bench import jax_peer, peers
from normlab.bench.timing import Timing, machine, take_turns, versions
from normlab.bench.work import EVALUATED, REPLICAS, WORKS, Peer, Work
from normlab.processes import Workers
from normlab.training.devices import compute_exactly, find_device, name_of

__all__ = ["FleetBenchmark", "Row", "bench_fleet", "makers"]

_NEEDED = {"tutorial": ("pillow", "PIL"), "jax": ("jax", "jax")}
"""What peers need that normlab does not: a package, and its module."""


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
        work: What was trained.
        timings: Seconds per replica and epoch of training, by peer.
        evaluations: Seconds in which a replica is evaluated on `EVALUATED` images, by peer.
        losses: Mean loss of a peer's first call and of its last: it did train.
        startup: Seconds in which the tutorials' loader starts and ends its processes; they are
            in its timings, once each.
        skipped: Peers that were not measured, and why.
    """

    work: Work
    timings: dict[str, Timing]
    evaluations: dict[str, Timing]
    losses: dict[str, tuple[float, float]]
    startup: float
    skipped: dict[str, str]

    def against(self, peer: str) -> dict[str, float]:
        """Return how many times faster than others a peer is; not a number for one not measured.

        The ceiling is the faster of the two ways to make the matrix products alone.
        """
        medians = {name: timing.median for name, timing in self.timings.items()}
        ceiling = min(median for name, median in medians.items() if name.startswith("products"))
        return {
            "against tutorial": medians.get("tutorial", math.nan) / medians[peer],
            "against eager": medians["eager"] / medians[peer],
            "against jax": medians.get("jax", math.nan) / medians[peer],
            "share of the ceiling": ceiling / medians[peer],
            "with evaluation": self._evaluated("tutorial") / self._evaluated(peer),
        }

    def _evaluated(self, peer: str) -> float:
        if peer not in self.evaluations:
            return math.nan
        return self.timings[peer].median + self.evaluations[peer].median


@dataclass(frozen=True)
class FleetBenchmark:
    """All that was measured.

    Attributes:
        rows: Of each piece of work.
        versions: Of normlab, torch and Python, and of what only peers need.
        machine: Its processor, vector instructions and threads.
    """

    rows: list[Row]
    versions: dict[str, str]
    machine: str

    def frame(self) -> pd.DataFrame:
        """Return a row for each work and peer: seconds with quartiles, and ratios."""
        return pd.DataFrame(
            [
                {
                    "work": row.work.name,
                    "peer": peer,
                    "seconds": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    "evaluation": getattr(row.evaluations.get(peer), "median", math.nan),
                    **row.against(peer),
                }
                for row in self.rows
                for peer, timing in row.timings.items()
            ]
        )

    def __str__(self) -> str:
        lines = [
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            self.machine,
            "Seconds per replica and epoch of training, medians and quartiles, and of an "
            f"evaluation on {EVALUATED:,} images.",
            "Ratios to other peers are of training alone; the last is to the tutorial, both with "
            "an evaluation an epoch. More is faster.",
            "",
        ]
        frame = self.frame()
        for row in self.rows:
            table = frame[frame["work"] == row.work.name].drop(columns="work")
            table = table.dropna(axis="columns", how="all")
            text = table.to_string(index=False, na_rep="", float_format="{:.3g}".format)
            lines += [row.work.name, text]
            if row.work.dataset == "random":
                shape = "×".join(map(str, row.work.image_shape))
                lines.append(f"Data: {row.work.images:,} images of random bytes, {shape}.")
            lines += [f"Without {peer}: {reason}" for peer, reason in row.skipped.items()] + [""]
        return "\n".join(lines).rstrip()

    def to_json(self) -> dict[str, object]:
        """Return everything as plain values, ratios included; times are seconds."""
        rows = [
            asdict(row) | {"ratios": {peer: row.against(peer) for peer in row.timings}}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}


def bench_fleet(
    *,
    seconds: float = 30.0,
    works: Sequence[Work] = WORKS,
    fleets: Mapping[str, Callable[[Work], Peer]] | None = None,
    compiled: bool = True,
    device: str = "cpu",
    started: Callable[[Work], object] | None = None,
) -> FleetBenchmark:
    """Measure; takes some minutes.

    In a script, call it under `if __name__ == "__main__":`, for it starts processes.

    Args:
        seconds: To spend on each work, at least; every peer gets seven turns in any case.
        works: What is trained.
        fleets: More peers by name, normlab's own: functions of a module, for they travel to the
            process that measures.
        compiled: Measure `torch.compile` too.
        device: Where all of it is trained; JAX is measured on a CPU alone.
        started: Called with each work before it is measured.
    """
    found, rows = find_device(device), []
    for work in [replace(each, device=str(found)) for each in works]:
        if started is not None:
            started(work)
        with Workers(1) as workers:  # A new one each, so that no work inherits another's threads.
            rows.append(workers.submit(_measure, work, seconds, fleets or {}, compiled).result())
    extras = {
        package: version(package)
        for peer, (package, _) in _NEEDED.items()
        if peer not in _missing()
    }
    where = machine() if found.type == "cpu" else f"{name_of(found)}; {machine()}"
    return FleetBenchmark(rows, versions() | extras, where)


def makers(*, compiled: bool = True) -> dict[str, Callable[[Work], Peer]]:
    """Return what makes each peer, by name, in the order in which they are to be made.

    The tutorials' loop comes first: its loader forks, which is safe only before JAX has started.
    """
    made: dict[str, Callable[[Work], Peer]] = {
        "tutorial": peers.tutorial,
        "eager": peers.eager,
        "compiled": peers.compiled_eager,
        "jax": jax_peer.jax_fleet,
        "products": peers.products,
        f"products of {REPLICAS}": peers.stacked_products,
    }
    if not compiled:
        del made["compiled"]
    return made


def _missing() -> dict[str, str]:
    """Return the peers that cannot be measured, and why."""
    return {
        peer: f"{package} is not installed: pip install 'normlab[bench]'"
        for peer, (package, module) in _NEEDED.items()
        if find_spec(module) is None
    }


def _measure(
    work: Work, seconds: float, fleets: Mapping[str, Callable[[Work], Peer]], compiled: bool
) -> Row:
    compute_exactly(torch.device(work.device))  # As normlab's fleets are trained.
    skipped = _missing()
    if work.device != "cpu":
        skipped["jax"] = "it is measured on a CPU alone"
    startup = math.nan if "tutorial" in skipped else peers.startup(work)
    made = {
        name: maker(work)
        for name, maker in {**makers(compiled=compiled), **fleets}.items()
        if name not in skipped
    }
    losses: dict[str, list[float]] = {}

    def kept(name: str, train: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            if isinstance(loss := train(), float):
                losses.setdefault(name, []).append(loss)

        return run

    calls: dict[str, Callable[[], object]] = {}
    for name, peer in made.items():
        calls[name] = kept(name, peer.train)
        if peer.evaluate is not None:
            calls[f"{name}, evaluated"] = peer.evaluate
        if name == "tutorial":  # Its loader fills up, which the next peer should not pay for.
            calls["rest"] = lambda: time.sleep(0.05)
    seen = take_turns(calls, seconds=seconds)
    for peer in made.values():
        if peer.close is not None:
            peer.close()
    once = {"tutorial": startup}
    return Row(
        work,
        {
            name: _scaled(seen[name], work.steps_per_epoch / peer.steps, once.get(name, 0.0))
            for name, peer in made.items()
        },
        {
            name: _scaled(seen[f"{name}, evaluated"], EVALUATED / peer.images, once.get(name, 0.0))
            for name, peer in made.items()
            if peer.evaluate is not None
        },
        {name: (series[0], series[-1]) for name, series in losses.items()},
        startup,
        skipped,
    )


def _scaled(call: Timing, calls: float, once: float) -> Timing:
    median, low, high = (once + calls * each for each in (call.median, call.low, call.high))
    return Timing(median, low, high, call.rounds)
