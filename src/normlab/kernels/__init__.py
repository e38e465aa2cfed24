"""What is computed in C++: batch normalization, and whole training steps of small networks."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from normlab.kernels.build import LIBRARY

__all__ = ["ACTIVATIONS", "BUILT", "kernel"]

ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "sigmoid": 3, "silu": 4}
"""What a batch norm may have behind it, in the order of `Activation` in kernels.h."""

BUILT = LIBRARY.exists()
"""Whether there are kernels to call."""


def kernel(name: str, argtypes: list[Any], restype: Any = None) -> Any:
    """Return a function of the library, as compiled for this processor."""
    function = _library()[f"{name}_{_instruction_set()}"]
    function.argtypes, function.restype = argtypes, restype
    return function


@lru_cache(maxsize=1)
def _library() -> Any:
    """Load the library when it is first needed."""
    return ctypes.CDLL(str(LIBRARY))


def _instruction_set() -> str:
    level = _library().normlab_level_base()
    return f"v{level}" if level else "base"
