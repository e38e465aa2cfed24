"""Train, validation and test: which images belong to which, and how bytes become numbers."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normlab.data.datasets import Dataset
from normlab.errors import InputError
from normlab.kernels import BUILT, kernel
from normlab.streams import stream

__all__ = ["SCALINGS", "Splits", "gather", "scale", "split"]

SCALINGS = {"0..1": (1 / 255, 0.0), "-1..1": (2 / 255, -1.0)}
"""What a scaling does to a byte: the factor and the offset."""


@dataclass(frozen=True)
class Splits:
    """A data set and the indices of its images in each split; the images are held once.

    Attributes:
        dataset: Images and labels.
        indices: `train`, `validation` (absent if there is none) and `test`, each int64.
    """

    dataset: Dataset
    indices: dict[str, Tensor]

    def size(self, name: str) -> int:
        """Return how many images a split has."""
        return len(self.indices[name])

    def to(self, device: torch.device | str) -> Splits:
        """Return the same on a device; what is there already is not copied."""
        data = self.dataset
        moved = replace(data, images=data.images.to(device), labels=data.labels.to(device))
        return Splits(moved, {name: each.to(device) for name, each in self.indices.items()})


def split(dataset: Dataset, validation: int) -> Splits:
    """Set aside `validation` images of the training set, the same ones on every call.

    Args:
        dataset: What to split; its test set stays as it was published.
        validation: How many training images to hold out, drawn once from a fixed generator;
            0 for none.

    Raises:
        InputError: The training set is too small.

    >>> from normlab.data import load
    >>> {name: len(index) for name, index in split(load("mnist"), 5000).indices.items()}
    {'train': 55000, 'validation': 5000, 'test': 10000}
    """
    if not 0 <= validation < dataset.train_size:
        raise InputError(
            f"validation={validation}: {dataset.name} has {dataset.train_size} training images, "
            f"so 0 to {dataset.train_size - 1} can be held out"
        )
    # The user's files may be moved, and their validation images stay the same ones.
    identity = dataset.digest or dataset.name
    order = torch.randperm(dataset.train_size, generator=stream(0, "validation", identity))
    held_out, rest = order[:validation].sort().values, order[validation:].sort().values
    indices = {"train": rest, "validation": held_out} if validation else {"train": rest}
    indices["test"] = torch.arange(dataset.train_size, len(dataset.images))
    return Splits(dataset, indices)


def gather(images: Tensor, indices: Tensor, scaling: str) -> Tensor:
    """Return some images as float32, in one pass over them where there is a kernel for it.

    Args:
        images: uint8, shape (N, …).
        indices: int64, shape (n,).
        scaling: A key of `SCALINGS`.

    Returns:
        Shape (n, …); that of `scale(images[indices], scaling)` up to roundings.

    >>> gather(torch.tensor([[0], [51], [255]], dtype=torch.uint8), torch.tensor([1, 2]), "0..1")
    tensor([[0.2000],
            [1.0000]])
    """
    plain = images.is_contiguous() and indices.is_contiguous() and images.device.type == "cpu"
    if not (BUILT and plain):
        return scale(images[indices], scaling)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(images):
        raise IndexError(f"indices reach from {indices.min()} to {indices.max()}")
    out = torch.empty(len(indices), *images.shape[1:])
    _gather()(
        len(indices),
        images[:1].numel(),
        images.data_ptr(),
        indices.data_ptr(),
        *SCALINGS[scaling],
        out.data_ptr(),
    )
    return out


@lru_cache(maxsize=1)
def _gather() -> Any:
    size, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    return kernel("normlab_gather", [size, size, pointer, pointer, real, real, pointer])


def scale(images: Tensor, scaling: str) -> Tensor:
    """Turn bytes into float32.

    Args:
        images: uint8, any shape.
        scaling: A key of `SCALINGS`.

    >>> scale(torch.tensor([0, 255], dtype=torch.uint8), "-1..1")
    tensor([-1.,  1.])
    """
    factor, offset = SCALINGS[scaling]
    scaled = images.to(torch.float32).mul_(factor)
    return scaled.add_(offset) if offset else scaled
