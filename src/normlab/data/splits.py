"""Train, validation and test: which images belong to which, and how bytes become numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normlab.data.datasets import Dataset
from normlab.errors import InputError
from normlab.streams import stream

__all__ = ["SCALINGS", "Splits", "scale", "split"]

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
    order = torch.randperm(dataset.train_size, generator=stream(0, "validation", dataset.name))
    held_out, rest = order[:validation].sort().values, order[validation:].sort().values
    indices = {"train": rest, "validation": held_out} if validation else {"train": rest}
    indices["test"] = torch.arange(dataset.train_size, len(dataset.images))
    return Splits(dataset, indices)


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
