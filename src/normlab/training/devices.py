"""The device that a fleet is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from normlab.errors import InputError

__all__ = ["compute_exactly", "exact_products", "find_device", "name_of"]


def find_device(name: str) -> torch.device:
    """Return a device that fleets can be trained on, by the name that torch has for it.

    Raises:
        InputError: There is none of that name, or it cannot hold the sums, which are float64.

    >>> find_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.zeros(1, dtype=torch.float64, device=name)
        found.tolist()  # There are devices that hold no values.
    except (RuntimeError, AssertionError, TypeError) as error:
        told = str(error).partition("\n")[0].partition(". ")[0]  # The rest is about building torch.
        raise InputError(
            f"device {name!r} cannot be used ({told}): expected cpu, or cuda where torch has a GPU"
        ) from None
    return torch.device("cpu") if found.is_cpu else found.device  # There is one CPU, of no number.


def name_of(device: torch.device) -> str:
    """Return what a device is, for people and for what is kept: numbers may differ between two.

    >>> name_of(torch.device("cpu"))
    'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compute_exactly(device: torch.device) -> None:
    """Let a GPU compute float32 in float32, and cuDNN sum in one order, from now on.

    torch rounds the factors of convolutions to 10 bits there (TF32) unless it is told not to, and
    cuDNN may take algorithms whose sums come in another order each time. Other devices are as they
    are.
    """
    if device.type == "cuda":
        _set(_exact())


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Do what `compute_exactly` does for a while; then all is as it was."""
    if device.type != "cuda":
        yield
        return
    before = []
    for place, name, _ in _exact():
        with suppress(RuntimeError):  # The user's own do not agree.
            before.append((place, name, getattr(place, name)))
    try:
        compute_exactly(device)
        yield
    finally:
        _set(before)


def _exact() -> list[tuple[Any, str, object]]:
    """Return settings: where, which, and what they are to be."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    exact: list[tuple[Any, str, object]] = [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        # What came before the precisions below must agree with them: torch reads both, and raises.
        (cudnn, "allow_tf32", False),
    ]
    if hasattr(cudnn, "conv"):
        precisions = (matmul, cudnn, cudnn.conv, cudnn.rnn)
        exact += [(each, "fp32_precision", "ieee") for each in precisions]
    else:  # Before torch 2.9.
        exact.append((matmul, "allow_tf32", False))
    return exact


def _set(settings: Sequence[tuple[Any, str, object]]) -> None:
    backends: Any = torch.backends
    with backends.__allow_nonbracketed_mutation():  # As `cudnn.flags` does: it may be forbidden.
        for place, name, value in settings:
            setattr(place, name, value)
