"""What users name as `module:function`: imported from where they are, and called."""

from __future__ import annotations

import importlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from normlab.errors import InputError, did_you_mean

__all__ = ["call", "is_function"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_function(name: str) -> bool:
    """Tell whether a name has the form `module:function`.

    >>> [is_function(name) for name in ("mine:build", "package.module:Class.make", "mlp:32")]
    [True, True, False]
    """
    return bool(_FUNCTION.fullmatch(name))


def call(name: str) -> Any:
    """Call a user's function without arguments and return what it returns.

    Args:
        name: `module:function`. The current folder's modules can be named too, as `python -m` can.

    Raises:
        InputError: There is no such function, or it raised.

    >>> call("collections:OrderedDict")
    OrderedDict()
    """
    module_name, _, path = name.partition(":")
    folder = os.fspath(Path.cwd())
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()  # The module may have been written a moment ago.
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            raise InputError(
                f"{name}: {module_name} cannot be imported ({_told(error)})"
            ) from error
        for part in path.split("."):
            meant = did_you_mean(part, dir(found))
            found = getattr(found, part, None)
            if found is None:
                raise InputError(f"{name}: {module_name} has no {path}{meant}")
        if not callable(found):
            raise InputError(f"{name}: expected a function, got {type(found).__name__}")
        try:
            return found()
        except Exception as error:
            raise InputError(f"{name} raised {_told(error)}") from error
    finally:
        with suppress(ValueError):  # What was called may have taken it out.
            sys.path.remove(folder)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
