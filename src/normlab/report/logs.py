"""Logs that other programs read: what they have in common, and how they follow a run.

A log is a view of the ledger. It is brought up to what the ledger says from time to time while a
study trains, and can be written again from the ledger at any time after.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from normlab.errors import InputError
from normlab.study import Comparison, Study, Watcher
from normlab.training import Event, Replica, Setting

__all__ = [
    "Log",
    "Logs",
    "Point",
    "courses",
    "ends",
    "finals",
    "require",
    "run_name",
    "setting_name",
]

_SHARE = 0.05  # Of a run's time, at most, that its logs may take.


class Log(Protocol):
    """A form in which other programs read what a ledger says.

    Attributes:
        name: What `normlab export --to` calls it.
        out: The folder or the address that it is written to.
    """

    name: str
    out: str

    def write(self, comparison: Comparison) -> None:
        """Bring it up to what the comparison says; what is there already is not written twice.

        Raises:
            NormlabError: It cannot be written.
        """


class Logs:
    """Follows a run, and keeps logs up to date while it trains.

    They are written before the first replica is trained, then so often that they take a twentieth
    of the time, and at the end. One that fails before anything is trained ends the run; one that
    fails later is warned of in a line on standard error, and left alone.

    Args:
        folder: The run's.
        logs: What to write.
        display: Hears all that the run says, as if there were no logs.
    """

    def __init__(self, folder: Path, logs: Sequence[Log], display: Watcher | None = None) -> None:
        self._folder, self._logs, self._display = folder, list(logs), display
        self._next = 0.0

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._write()

    def begin(self, done: int, total: int) -> None:
        """Write what the ledger holds before this run adds to it.

        Raises:
            NormlabError: A log cannot be written.
        """
        comparison = Comparison(self._folder)
        for log in self._logs:
            log.write(comparison)
        if self._display:
            self._display.begin(done, total)

    def __call__(self, event: Event) -> None:
        """Hear of an event, and write what has been measured if it is time to."""
        if self._display:
            self._display(event)
        if time.perf_counter() >= self._next:
            self._write()

    def _write(self) -> None:
        started = time.perf_counter()
        comparison = None
        for log in tuple(self._logs):
            try:
                comparison = comparison or Comparison(self._folder)
                log.write(comparison)
            except Exception as error:  # Whatever is wrong with a log, the training goes on.
                self._logs.remove(log)
                again = ["normlab", "export", str(self._folder), "--to", log.name, "--out", log.out]
                print(
                    f"normlab: warning: the log for {log.name} ends here "
                    f"({' '.join(str(error).split())}); the ledger is whole, and writes it again: "
                    f"{shlex.join(again)}",
                    file=sys.stderr,
                )
        ended = time.perf_counter()
        self._next = ended + (ended - started) / _SHARE


class Point(NamedTuple):
    """What one evaluation of a replica saw, as logs show it.

    Attributes:
        step: Optimizer steps taken.
        time: When it was measured, in seconds since 1970 (UTC).
        values: By tag: the metric, and after a slash the split, such as `accuracy/test`.
    """

    step: int
    time: float
    values: dict[str, float]


def courses(comparison: Comparison) -> dict[Replica, list[Point]]:
    """Return what each replica measured, in the order of its steps."""
    import pandas as pd

    frame = comparison.frame()
    frame["time"] = (frame["time"] - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    found: dict[Replica, list[Point]] = {}
    for row in frame.to_dict("records"):
        course = found.setdefault(Replica(*(row[name] for name in Replica._fields)), [])
        if not course or course[-1].step != row["step"]:
            course.append(Point(row["step"], row["time"], {}))
        course[-1].values[f"{row['metric']}/{row['split']}"] = row["value"]
    return found


def ends(comparison: Comparison) -> dict[Replica, dict[str, Any]]:
    """Return what each replica that has an outcome ended with: a row of `Comparison.replicas`."""
    table = comparison.replicas().set_index(list(Replica._fields))
    return {Replica(*key): row for key, row in table.to_dict("index").items()}


def finals(comparison: Comparison, end: Mapping[str, Any]) -> dict[str, float]:
    """Return the comparison's metrics of a replica, from its row, but for those without a value."""
    numbers = {metric.name: float(end[metric.name]) for metric in comparison.metrics}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def run_name(study: Study, replica: Replica) -> str:
    """Return what logs call a replica.

    >>> run_name(Study(), Replica("batch", 0.01, 3))
    'batch/lr=0.01/seed=3'
    """
    setting = setting_name(study, replica.setting)
    return f"{replica.arm}/{setting}/seed={replica.seed}"


def setting_name(study: Study, setting: Setting) -> str:
    """Return what logs call a learning rate and a weight decay; the latter if there is one.

    >>> setting_name(Study(weight_decay=[0, 1e-4]), Setting(0.1, 1e-4))
    'lr=0.1/weight_decay=0.0001'
    """
    decay = f"/weight_decay={setting.weight_decay!r}" if any(study.weight_decay) else ""
    return f"lr={setting.lr!r}{decay}"


def require(package: str, extra: str) -> None:
    """Refuse to go on without a package that comes with one of normlab's extras.

    Raises:
        InputError: It cannot be imported.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise InputError(
            f"{package} cannot be imported ({error}): install normlab with its extra {extra}, "
            f"pip install 'normlab[{extra}]'"
        ) from None
