"""What a person sees while a study runs: a live display, or plain lines in a file or a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from normlab.report.wording import duration
from normlab.study import Study
from normlab.training import Choice, Event, Measurement, Outcome, Replica

__all__ = ["Live"]


class Live:
    """Follows a run on standard error.

    On a terminal: one bar for the whole study and a line for each replica that is in training. In
    a file or a pipe: a line for each replica that ends.

    Args:
        study: What runs.
        console: Where to write; standard error if none is given.
    """

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self._study = study
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._training: dict[Replica, TaskID] = {}
        self._epochs: dict[Replica, int] = {}
        self._last: dict[Replica, Measurement] = {}
        self._resumed = self._done = self._diverged = 0

    def __enter__(self) -> Live:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def begin(self, done: int, total: int) -> None:
        """Note how many replicas the ledger holds already, and of how many."""
        self._resumed = self._done = done
        self._total = total
        self._started = time.perf_counter()
        if done and done < total:
            self._console.print(f"{done} of {total} replicas are in the ledger; going on")
        if self._progress:
            epochs = self._study.epochs
            self._whole = self._progress.add_task(
                "all replicas", total=total * epochs, completed=done * epochs, state=self._state()
            )

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Choice):
            self._chosen(event)
        elif isinstance(event, Measurement):
            self._measured(event)
        elif isinstance(event, Outcome):
            self._ended(event)
        if self._progress:
            epochs = self._resumed * self._study.epochs + sum(self._epochs.values())
            self._progress.update(self._whole, completed=epochs, state=self._state())

    def _chosen(self, event: Choice) -> None:
        timed = ", ".join(
            f"{engine} {seconds * 1e3:.2f} ms" for engine, seconds in event.seconds.items()
        )
        self._console.print(
            f"{event.arm}: trained {event.engine} (a step takes {timed})",
            markup=False,
            soft_wrap=True,
        )

    def _measured(self, event: Measurement) -> None:
        self._last[event.replica] = event
        self._epochs[event.replica] = event.epoch
        if self._progress is None:
            return
        if event.replica not in self._training:
            self._training[event.replica] = self._progress.add_task(
                str(event.replica), total=self._study.epochs, state=""
            )
        self._progress.update(
            self._training[event.replica],
            completed=event.epoch,
            state=f"epoch {event.epoch}/{self._study.epochs}  {_numbers(event)}",
        )

    def _ended(self, event: Outcome) -> None:
        self._done += 1
        self._diverged += event.status == "diverged"
        self._epochs[event.replica] = self._study.epochs  # One that diverged has no more to do.
        if self._progress:
            if event.replica in self._training:
                self._progress.remove_task(self._training.pop(event.replica))
            return
        last = self._last.get(event.replica)
        numbers = (
            f"diverged by step {event.step:,}"
            if event.status == "diverged"
            else _numbers(last)
            if last
            else ""
        )
        self._console.print(
            f"[{self._done}/{self._total}] {event.replica!s}: {numbers}, "
            f"{duration(event.seconds)}{self._left()}",
            markup=False,
            soft_wrap=True,
        )

    def _state(self) -> str:
        diverged = f", {self._diverged} diverged" if self._diverged else ""
        return f"{self._done}/{self._total} done{diverged}{self._left()}"

    def _left(self) -> str:
        """Return the time left, from what this session has done so far."""
        done = sum(self._epochs.values())
        to_do = (self._total - self._resumed) * self._study.epochs - done
        if not done or not to_do:
            return ""
        return f", about {duration((time.perf_counter() - self._started) / done * to_do)} left"


def _numbers(measurement: Measurement) -> str:
    split = "validation" if ("validation", "loss") in measurement.values else "test"
    loss, accuracy = (measurement.values[split, metric] for metric in ("loss", "accuracy"))
    return f"{split} loss {loss:.4f}, accuracy {accuracy:.2%}"
