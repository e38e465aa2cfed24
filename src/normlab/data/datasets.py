"""Data sets by name, checked against the hashes of their arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from normlab.errors import InputError, NormlabError, did_you_mean

__all__ = ["Dataset", "dataset_names", "load"]

_FOLDER = Path(__file__).parent

# SHA-256 of each array's bytes in C order, so that they hold whatever container the array came in.
_SHA256 = {
    "mnist": {
        "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    },
}


@dataclass(frozen=True)
class Dataset:
    """Images and labels, the training set first and the test set after it.

    Attributes:
        name: As `load` takes it.
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        train_size: How many of the N are the training set.
        classes: How many different labels there are.
    """

    name: str
    images: Tensor
    labels: Tensor
    train_size: int
    classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def dataset_names() -> list[str]:
    """Return the names that `load` knows."""
    return list(_SHA256)


@lru_cache(maxsize=1)
def load(name: str) -> Dataset:
    """Load a data set and check it.

    Args:
        name: One of `dataset_names()`. `mnist` comes with the package: 60,000 training and 10,000
            test images of handwritten digits, 28×28.

    Raises:
        InputError: The name is unknown.
        NormlabError: The file is not the one that was published.

    >>> load("mnist").images.shape
    torch.Size([70000, 1, 28, 28])
    """
    if name not in _SHA256:
        raise InputError(
            f"unknown dataset {name!r}{did_you_mean(name, _SHA256)}: known are {', '.join(_SHA256)}"
        )
    path = _FOLDER / f"{name}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: np.ascontiguousarray(archive[key]) for key in _SHA256[name]}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise NormlabError(f"{path} cannot be read ({error}): install again") from None
    for key, expected in _SHA256[name].items():
        if hashlib.sha256(arrays[key].data).hexdigest() != expected:
            raise NormlabError(
                f"{path}: {key} is not the published array (its SHA-256 differs): install again"
            )
    images = np.concatenate([arrays["train_images"], arrays["test_images"]])
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]]).astype(np.int64)
    return Dataset(
        name=name,
        images=torch.from_numpy(images).unsqueeze(1),
        labels=torch.from_numpy(labels),
        train_size=len(arrays["train_labels"]),
        classes=int(labels.max()) + 1,
    )
