"""Data sets by name: published ones, checked against their hashes, and the user's own."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normlab.data.cache import fetch_published, place, read_published
from normlab.data.layouts import AbsentError, Arrays, DamagedError
from normlab.data.own import Own, is_own, read_own, stamp
from normlab.data.progress import Progress
from normlab.data.published import PUBLISHED, Published
from normlab.errors import InputError, NormlabError, did_you_mean

__all__ = [
    "Dataset",
    "check_dataset",
    "dataset_names",
    "fetch",
    "load",
    "published_facts",
    "verify",
    "where",
]


@dataclass(frozen=True)
class Dataset:
    """Images and labels, the training set first and the test set after it.

    Attributes:
        name: As `load` takes it.
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        train_size: How many of the N are the training set.
        classes: How many different labels there are.
        class_names: In the order of the labels; empty if the classes have none.
        digest: SHA-256 of all that is above but the names, for data of the user's own; a published
            set never changes, and is known by its name.
        test_is_drawn: Whether the test set was drawn from the user's images, for want of one.
    """

    name: str
    images: Tensor
    labels: Tensor
    train_size: int
    classes: int
    class_names: tuple[str, ...] = ()
    digest: str | None = None
    test_is_drawn: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def dataset_names() -> list[str]:
    """Return the names of the published sets that `load` knows.

    >>> dataset_names()
    ['mnist', 'fashion-mnist', 'cifar10']
    """
    return list(PUBLISHED)


def check_dataset(name: str) -> None:
    """Refuse a name that `load` cannot know, without looking for the data.

    Raises:
        InputError: It is neither a published set's nor has the form of a path or function.

    >>> check_dataset("mine.npz")
    """
    if name not in PUBLISHED and not is_own(name):
        raise InputError(
            f"unknown dataset {name!r}{did_you_mean(name, PUBLISHED)}: known are "
            f"{', '.join(PUBLISHED)}; your own is FILE.npz, a folder (./{name}), or module:function"
        )


def load(name: str, *, progress: bool = True) -> Dataset:
    """Load a data set and check it; a published set that is not here yet is fetched.

    The last one of either kind is kept: loading it again is free, unless files have changed.

    Args:
        name: One of `dataset_names()`; of these mnist comes with the package. Or the user's own:
            the path of an `.npz` or of a folder of images by class, relative to the current
            folder, or `module:function` (docs/data.md says what is in them).
        progress: Tell on standard error what is fetched.

    Raises:
        InputError: The name is unknown, or the user's data cannot be used.
        FetchError: The set is not here and cannot be fetched; says of each source why.
        NormlabError: The bundled file is not the one that was published.

    >>> load("mnist").images.shape
    torch.Size([70000, 1, 28, 28])
    """
    check_dataset(name)
    if name not in PUBLISHED:
        return _load_own(name, stamp(name))
    with suppress(AbsentError):
        return _load_published(name)
    fetch_published(PUBLISHED[name], None, Progress(progress))
    return _load_published(name)


def fetch(name: str, *, data_dir: str | Path | None = None, progress: bool = True) -> Path:
    """Put a published set where `load` finds it, from the first source that has it.

    Args:
        name: One of `dataset_names()`.
        data_dir: A folder that may hold the set's files; `NORMLAB_DATA` names one too.
        progress: Tell on standard error what is done.

    Returns:
        The path of the file that holds the set, its arrays checked.

    Raises:
        InputError: The name is unknown, or a folder cannot be used.
        FetchError: No source has it; says of each why.

    >>> fetch("mnist").name
    'mnist.npz'
    """
    folder = None if data_dir is None else Path(data_dir)
    return fetch_published(_published(name), folder, Progress(progress))


def where(name: str) -> Path | None:
    """Return the path of the file that holds a published set, or None if it is not here.

    Raises:
        InputError: The name is unknown.

    >>> where("mnist").name
    'mnist.npz'
    """
    path = place(_published(name))
    return path if path.is_file() else None


def verify(name: str) -> None:
    """Read a published set's file, and compare its arrays with what was published.

    Raises:
        InputError: The name is unknown.
        NormlabError: It is not here, or is not as it was published.

    >>> verify("mnist")
    """
    published = _published(name)
    path = place(published)
    try:
        read_published(published)
    except DamagedError as error:
        raise NormlabError(f"{path}: {error}; normlab data fetch {name} puts it right") from None
    except AbsentError:
        raise NormlabError(f"{name} is not here: normlab data fetch {name} gets it") from None


def published_facts(name: str) -> dict[str, Any]:
    """Return what a published set is made of, without reading it.

    Raises:
        InputError: The name is unknown.

    >>> published_facts("cifar10")["image_shape"]
    (3, 32, 32)
    """
    published = _published(name)
    train, height, width, *channels = published.arrays["train_images"].shape
    return {
        "name": name,
        "image_shape": (*(channels or (1,)), height, width),
        "train": train,
        "test": published.arrays["test_images"].shape[0],
        "classes": len(published.class_names),
    }


def _published(name: str) -> Published:
    if name not in PUBLISHED:
        raise InputError(
            f"unknown published set {name!r}{did_you_mean(name, PUBLISHED)}: known are "
            f"{', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


@lru_cache(maxsize=1)
def _load_published(name: str) -> Dataset:
    published = PUBLISHED[name]
    arrays = read_published(published)
    return Dataset(
        name=name,
        images=_joined(arrays),
        labels=torch.from_numpy(
            np.concatenate([arrays["train_labels"], arrays["test_labels"]]).astype(np.int64)
        ),
        train_size=len(arrays["train_labels"]),
        classes=len(published.class_names),
        class_names=published.class_names,
    )


def _joined(arrays: Arrays) -> Tensor:
    """Return training and test images in one tensor (N, C, H, W), with no copy in between."""
    parts = [torch.from_numpy(arrays[f"{part}_images"]) for part in ("train", "test")]
    parts = [part.unsqueeze(1) if part.ndim == 3 else part.permute(0, 3, 1, 2) for part in parts]
    images = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=torch.uint8)
    for part, room in zip(parts, images.split([len(part) for part in parts]), strict=True):
        room.copy_(part)
    return images


@lru_cache(maxsize=1)
def _load_own(name: str, _: Any) -> Dataset:
    """Load the user's data; the second argument is its stamp, by which it is remembered."""
    own = read_own(name)
    return Dataset(
        name=name,
        images=torch.from_numpy(own.images),
        labels=torch.from_numpy(own.labels),
        train_size=own.train_size,
        classes=int(own.labels.max()) + 1,
        class_names=own.class_names,
        digest=_digest(own),
        test_is_drawn=own.test_is_drawn,
    )


def _digest(own: Own) -> str:
    digest = hashlib.sha256(f"{own.images.shape} {own.train_size}".encode())
    digest.update(np.ascontiguousarray(own.images).data)
    digest.update(np.ascontiguousarray(own.labels).data)
    return digest.hexdigest()
