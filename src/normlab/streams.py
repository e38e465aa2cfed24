"""Random numbers: a generator for each purpose of a seed, and the global ones left as found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generators_kept", "stream"]


def stream(seed: int, *purpose: object) -> torch.Generator:
    """Return a generator that belongs to one purpose of a seed.

    Initialization, batch order and dropout each draw from a stream of their own, so that two arms
    with different layers still share the streams they have in common: a draw more in one of them
    does not shift another.

    Args:
        seed: The replica's seed.
        purpose: What the numbers are for, from general to particular.

    Returns:
        A CPU generator, the same for the same arguments, on every platform.

    >>> a, b = stream(0, "init", "hidden0.linear"), stream(0, "order")
    >>> bool(torch.rand(3, generator=a).equal(torch.rand(3, generator=b)))
    False
    """
    key = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    # torch's CPU generator uses the low 32 bits of its seed and wants it below 2**63.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give global generators their states back at the end: Python's, NumPy's, CPU's and CUDA's."""
    # NumPy's legacy one: it is that which code draws from without naming one.
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Of a device that was never used there is no state, and asking would start it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)  # noqa: NPY002
