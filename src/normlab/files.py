"""Files that are either whole or absent, and the folder for those that can be made again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["cache_folder", "replace"]


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


def cache_folder() -> Path:
    """Return where normlab keeps what can be made or fetched again.

    The folder that `NORMLAB_CACHE` names, or the platform's own (`~/.cache/normlab` on Linux).
    """
    chosen = os.environ.get("NORMLAB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("normlab", appauthor=False)
