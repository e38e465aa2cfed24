"""What a fetch tells on standard error."""

from __future__ import annotations

import sys

__all__ = ["Progress"]


class Progress:
    """Says what is fetched, a line each, with a bar for what takes long if a terminal shows it.

    Args:
        shown: Whether to say anything.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def say(self, line: str) -> None:
        """Print a line."""
        if self.shown:
            print(line, file=sys.stderr, flush=True)

    def bar(self) -> Bar | None:
        """Return a bar, if there is somebody to see it."""
        return Bar() if self.shown and sys.stderr.isatty() else None


class Bar:
    """A bar of bytes, by rich, with the methods that pooch calls.

    Attributes:
        had: Bytes that were there before the first `update`.
    """

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("")
        self.had = self._total = 0

    @property
    def total(self) -> int:
        """Bytes to come; pooch assigns it when the server has said."""
        return self._total

    @total.setter
    def total(self, count: int) -> None:
        self._total = count
        self._progress.update(self._task, total=self.had + count, completed=self.had)
        self._progress.start()

    def update(self, count: int) -> None:
        """Move by so many bytes."""
        self._progress.advance(self._task, count)

    def reset(self) -> None:
        """Go back to where it began; pooch does so before it fills the bar."""
        self._progress.update(self._task, completed=self.had)

    def close(self) -> None:
        """Take it off the screen."""
        self._progress.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
