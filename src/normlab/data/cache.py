"""The cache of published data sets: one checked file for each, put there by `fetch`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normlab.data.layouts import AbsentError, Arrays, Layout, npz, safetensors
from normlab.data.progress import Progress
from normlab.data.published import Published
from normlab.data.sources import Attempt, Source
from normlab.errors import FetchError, InputError, NormlabError
from normlab.files import cache_folder, replace

__all__ = ["fetch_published", "place", "read_published"]


def place(published: Published) -> Path:
    """Return the path of the file that holds a set, or would if it were here."""
    return published.bundled or cache_folder() / "data" / f"{published.name}.safetensors"


def read_published(published: Published) -> Arrays:
    """Read a set's file and compare it with what was published.

    Raises:
        AbsentError: It is not here.
        DamagedError: It is not as it was published.
        NormlabError: It came with the package, and one of these.
    """
    path = place(published)
    try:
        arrays = _layout(path).read(path.parent)
        published.check(arrays)
    except AbsentError as error:
        if published.bundled is None:
            raise
        raise NormlabError(f"{path}: {error}: install normlab again") from None
    return arrays


def fetch_published(published: Published, data_dir: Path | None, progress: Progress) -> Path:
    """Put a set into the cache, from the first source that has it, and return the file's path.

    The sources: the cache itself, the user's folder, and those of the set. A fetch that is killed
    leaves what it has to the next, and another process that fetches the same set is waited for.

    Args:
        published: Which.
        data_dir: A folder that may hold its files; that which `NORMLAB_DATA` names if none is
            given.
        progress: Hears what is done.

    Raises:
        InputError: There is no such folder, or the cache cannot be written.
        FetchError: No source has it; says of each why.
    """
    path = place(published)
    if published.bundled is not None:
        read_published(published)
        return path
    sources: list[Source] = list(published.sources)
    if data_dir is None and os.environ.get("NORMLAB_DATA"):
        data_dir = Path(os.environ["NORMLAB_DATA"])
    if data_dir is not None:
        data_dir = data_dir.expanduser()
        if not data_dir.is_dir():
            raise InputError(f"{data_dir} is no folder: --data-dir and NORMLAB_DATA name one")
        sources.insert(0, published.in_folder(data_dir))
    with _alone_with(path, progress):
        _fill(published, path, sources, progress)
    return path


@contextmanager
def _alone_with(path: Path, progress: Progress) -> Iterator[None]:
    """Let no other process fetch this set meanwhile."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.say(f"{path.stem}: waiting for another process that fetches it")
            lock.acquire()
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be written ({error.strerror}): name another folder in "
            "NORMLAB_CACHE"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _fill(published: Published, path: Path, sources: list[Source], progress: Progress) -> None:
    try:
        read_published(published)
    except AbsentError as error:
        tried = [f"the cache: {error}"]
    else:
        return
    # Of this set alone, and guarded by its lock; what a killed fetch left there is gone on with.
    aside = path.with_suffix(".partial")
    for source in sources:
        progress.say(f"{published.name}: trying {source}")
        try:
            aside.mkdir(exist_ok=True)
            arrays = source.obtain(Attempt(aside, published.check, progress))
            _keep(arrays, path, aside)
        except (AbsentError, OSError) as error:
            tried.append(f"{source}: {error}")
        else:
            progress.say(f"{published.name}: kept as {path}")
            return
    if not any(file.is_file() and file.stat().st_size for file in aside.rglob("*")):
        shutil.rmtree(aside, ignore_errors=True)  # Nothing has begun to come.
    raise FetchError("\n".join([f"{published.name} cannot be had:", *tried, _advice(published)]))


def _keep(arrays: Arrays, path: Path, aside: Path) -> None:
    from safetensors.numpy import save

    # Written where a kill leaves no stray file, and moved when it is whole.
    whole = aside / path.name
    replace(whole, save(arrays))
    whole.replace(path)
    shutil.rmtree(aside)


def _layout(path: Path) -> Layout:
    return (npz if path.suffix == ".npz" else safetensors)(path.name)


def _advice(published: Published) -> str:
    ways = "; or ".join(" ".join(layout.files) for layout in published.layouts)
    return (
        f"To put it there by hand: get {published.name}.safetensors from the cache of another "
        f"machine, or {ways}; then normlab data fetch {published.name} --data-dir FOLDER"
    )
