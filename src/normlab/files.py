"""Files that are either whole or absent, and the folder for those that can be made again."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normlab.errors import InputError

__all__ = ["cache_folder", "held", "replace"]


def replace(path: Path, content: str | bytes) -> None:
    """Put `content` in place of whatever is at `path`, in one step.

    The content is written beside the target and renamed over it, so a reader sees the old file or
    the new one, and a failure (a full disk, a kill) leaves the old one.

    Args:
        path: The file to replace; its folder must exist.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, lock: str) -> Iterator[None]:
    """Make a folder if it is not there, and keep it from other writers.

    Args:
        folder: Where results are written.
        lock: Name of the file in it that says so to others.

    Raises:
        InputError: It cannot be written, or another run holds it.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = FileLock(folder / lock)
        # Who asks whether it is in use has it for an instant.
        own.acquire(timeout=0.1, poll_interval=0.01)
    except FileExistsError:
        raise InputError(f"{folder} is a file: name a folder with --out") from None
    except Timeout:
        raise InputError(
            f"{folder} is in use by another run: wait for it, or name another with --out"
        ) from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        own.release()


def cache_folder() -> Path:
    """Return where normlab keeps what can be made or fetched again.

    The folder that `NORMLAB_CACHE` names, or the platform's own (`~/.cache/normlab` on Linux).
    """
    chosen = os.environ.get("NORMLAB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("normlab", appauthor=False)
