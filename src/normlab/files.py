"""Files that are either whole or absent."""

from __future__ import annotations

import os
import secrets
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
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
