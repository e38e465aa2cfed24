"""The report of a run while it goes on, in a browser on the same machine."""

from __future__ import annotations

import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from types import TracebackType

from normlab.errors import InputError, LedgerError
from normlab.report.loopback import Loopback
from normlab.report.page import page_html
from normlab.study import Comparison, Watcher
from normlab.study.ledger import FILENAME, Ledger
from normlab.training import Event

__all__ = ["Watch", "watch"]

_SHARE = 0.05  # Of the time, at most, that drawing may take.
_FIRST = 20.0  # Seconds after the first drawing, most of whose time is spent once and for all.
_ASKS = 2.0  # Seconds after which a page asks again; as in watching.html.


class _Live:
    """A run's report as the ledger has it, drawn when somebody asks, and not too often.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawing = threading.Lock()
        self._page = b""
        self._drawn = ""  # The ledger's stamp then.
        self._next = 0.0
        self._rest: tuple[str | None, bool] = (
            None,
            False,
        )  # Of a ledger that nobody wrote to: its stamp, whether complete.
        self.asked: float | None = None
        self.told_all: float | None = None

    def state(self) -> str:
        """Return `live`, `finished`, or `idle`: not finished, and nobody writes.

        Raises:
            InputError: The ledger is gone.
            LedgerError: It is damaged.
        """
        if Ledger.in_use(self._folder):
            return "live"
        stamp = Ledger.stamp(self._folder)
        if self._rest[0] != stamp:
            try:
                with Ledger.read(self._folder) as ledger:
                    complete = len(ledger.finished()) == len(ledger.study.replicas)
            except LedgerError:
                if Ledger.in_use(self._folder):  # A run began meanwhile.
                    return "live"
                raise
            self._rest = (stamp, complete)
        return "finished" if self._rest[1] else "idle"

    def version(self) -> tuple[str, bytes]:
        """Return the state, and a text that changes when there is another page to be had."""
        self.asked = time.monotonic()
        state, stamp = self.state(), Ledger.stamp(self._folder)
        version = stamp if self._due(state, stamp) else self._drawn
        return "text/plain", f"{state} {version}".encode()

    def page(self) -> tuple[str, bytes]:
        """Return the page, drawn anew if the ledger has changed and it is time to."""
        with self._drawing:
            # The state first: what is drawn in the state `finished` is the last page then.
            state, stamp = self.state(), Ledger.stamp(self._folder)
            if self._due(state, stamp):
                self._draw(stamp)
            self.asked = time.monotonic()
            if state == "finished":
                self.told_all = self.asked
            return "text/html; charset=utf-8", self._page

    def _due(self, state: str, stamp: str) -> bool:
        if not self._page:
            return True
        return stamp != self._drawn and (state == "finished" or time.monotonic() >= self._next)

    def _draw(self, stamp: str) -> None:
        first, wall, cpu = not self._page, time.monotonic(), time.process_time()
        try:
            page = page_html(Comparison(self._folder))
            self._page, self._drawn = self._with_script(page, stamp).encode(), stamp
        finally:
            # On a busy machine drawing waits, which costs nothing; and where this process trains
            # too, its processor time is not all for drawing. The lesser is still enough.
            ended = time.monotonic()
            cost = min(ended - wall, time.process_time() - cpu)
            self._next = ended + (_FIRST if first else cost / _SHARE)

    def _with_script(self, page: str, stamp: str) -> str:
        """Return the page with what brings it up to date."""
        template = Template((resources.files(__package__) / "watching.html").read_text("utf-8"))
        script = template.substitute(
            version=escape(stamp), report=escape(str(self._folder / "report.html"))
        )
        body, end, rest = page.rpartition("</body>")
        return body + script + end + rest

    def linger(self, asked: float, not_asked: float) -> None:
        """Wait until the pages that are open have the last state, or Ctrl-C.

        Args:
            asked: Seconds to wait at most for a page that has asked before.
            not_asked: Seconds to wait for one that has not.
        """
        began = time.monotonic()
        with suppress(KeyboardInterrupt):
            while not self._over(began, asked, not_asked):
                time.sleep(0.1)

    def _over(self, began: float, asked: float, not_asked: float) -> bool:
        now = time.monotonic()
        if self.told_all is not None:  # Another page may be open, and has its turn too.
            return now >= self.told_all + _ASKS + 0.5
        if self._drawing.locked():
            return False
        return now >= began + (not_asked if self.asked is None else asked)


class Watch:
    """Serves the report of a run that this process makes, and ends with it.

    Its address is written to standard error before anything is trained. Whatever is wrong with it,
    the run goes on.

    Args:
        folder: The run's.
        display: Hears all that the run says, as if nobody watched.
    """

    def __init__(self, folder: Path, display: Watcher | None = None) -> None:
        self._live, self._display = _Live(folder), display
        self._server: Loopback | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is None:
            return
        if error is None:
            self._live.linger(asked=5, not_asked=0)
        self._server.__exit__(kind, error, traceback)

    def begin(self, done: int, total: int) -> None:
        """Serve, if there is anything left to train."""
        if done < total:
            try:
                self._server = _server(self._live).__enter__()
                print(f"Watch: {self._server.address}", file=sys.stderr, flush=True)
            except Exception as error:
                print(f"normlab: warning: nobody can watch: {error}", file=sys.stderr)
        if self._display:
            self._display.begin(done, total)

    def __call__(self, event: Event) -> None:
        """Let the display hear of an event; the ledger tells the page."""
        if self._display:
            self._display(event)


def watch(
    folder: str | Path,
    port: int = 0,
    *,
    browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the report of a run that another process makes, until it is complete or Ctrl-C.

    The page is for who has its address, on this machine. Nothing is written to the folder.

    Args:
        folder: The run's. If it holds no ledger yet, one is waited for.
        port: To listen at on 127.0.0.1; a free one for 0.
        browser: Whether to open the page in one.
        say: Is given lines for the user, the address among them.

    Raises:
        InputError: There is no such folder, the port cannot be had, or the ledger is taken away.
        LedgerError: The ledger is damaged or is none.

    >>> watch("runs/absent")
    Traceback (most recent call last):
    normlab.errors.InputError: runs/absent is not there: expected the folder of a run
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: expected the folder of a run")
    with suppress(KeyboardInterrupt):
        _wait_for_ledger(folder, say)
        live = _Live(folder)
        if live.state() != "finished":
            with _server(live, port) as server:
                say(f"Watch: {server.address}")
                if browser:
                    webbrowser.open(server.address)
                while live.state() != "finished":
                    time.sleep(1)
                # Once a minute is how often a page that is not seen asks, in a browser that saves.
                live.linger(asked=75, not_asked=5)
        say(f"The study is complete. Report: {folder / 'report.html'}")


def _server(live: _Live, port: int = 0) -> Loopback:
    return Loopback({"": live.page, "version": live.version}, port)


def _wait_for_ledger(folder: Path, say: Callable[[str], object]) -> None:
    told = False
    while not _is_begun(folder):
        if not told:
            say(f"{folder} holds no run yet: waiting for one to begin")
            told = True
        time.sleep(0.5)


def _is_begun(folder: Path) -> bool:
    if not (folder / FILENAME).is_file():
        return False
    try:
        with Ledger.read(folder):
            return True
    except LedgerError:
        if Ledger.in_use(folder):  # It is being made.
            return False
        raise
