"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["replace"]


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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's umask: mkstemp makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
