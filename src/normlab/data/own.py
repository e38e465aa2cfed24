"""The user's own data: an archive, a folder of images by class, or a function that returns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from normlab.data.images import read_folder
from normlab.data.layouts import UNREADABLE
from normlab.data.pixels import to_bytes, to_labels
from normlab.errors import InputError
from normlab.imports import call, is_function
from normlab.streams import stream

__all__ = ["Own", "is_own", "read_own", "stamp"]

# As normlab's own files name them, as short archives do, and as Keras' files do.
_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_TEST_SHARE = 6  # Of so many images of a class, one becomes a test image.


class Own(NamedTuple):
    """Data of the user's own, checked.

    Attributes:
        images: uint8, shape (N, C, H, W), the training set first.
        labels: int64, shape (N,), from 0.
        train_size: How many of the N are the training set.
        class_names: In the order of the labels; empty if the classes have none.
        test_is_drawn: Whether the test set was drawn from the images here, for want of one.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    train_size: int
    class_names: tuple[str, ...]
    test_is_drawn: bool


def is_own(name: str) -> bool:
    """Tell whether a name is that of a user's data, by its form alone.

    A file that ends in `.npz`, any path with a separator in it (`./images`), or `module:function`.

    >>> [is_own(name) for name in ("mnist", "./mnist", "mine.npz", "mine:load")]
    [False, True, True, True]
    """
    is_path = name.endswith(".npz") or "/" in name or os.sep in name or name in (".", "..")
    return is_path or is_function(name)


def stamp(name: str) -> tuple[Any, ...]:
    """Return what changes when files do: their paths, sizes and times.

    A module is imported once in a process, so its function is called once too.
    """
    if is_function(name):
        return (Path.cwd(),)
    path = Path(name).expanduser().absolute()
    found = [path]
    for folder, folders, files in os.walk(path):
        folders.sort()
        found += [Path(folder, file) for file in sorted(files)]
    return tuple((str(file), *_facts(file)) for file in found)


def _facts(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except OSError:
        return (0, 0)
    return facts.st_size, facts.st_mtime_ns


def read_own(name: str) -> Own:
    """Read the user's data and check it.

    Args:
        name: One that `is_own` knows; a path is relative to the current folder.

    Raises:
        InputError: It cannot be read, or is not what a study can be made on.
    """
    path = Path(name).expanduser()
    if is_function(name):
        return _check(_call(name), name)
    if path.is_dir():
        arrays, class_names = read_folder(path)
        return _check(arrays, name, class_names)
    if not path.exists():
        raise InputError(f"{name}: there is no such file or folder")
    if path.suffix != ".npz":
        raise InputError(f"{name}: expected a file that ends in .npz, or a folder of images")
    return _check(_read_npz(path), name)


def _read_npz(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            schemes = [keys for keys in _KEYS if keys[0] in archive and keys[1] in archive]
            if len(schemes) != 1:
                held = ", ".join(archive.files) or "nothing"
                raise InputError(
                    f"{path}: expected images and labels under one of "
                    f"{'; '.join(' '.join(keys) for keys in _KEYS)} (the last two may be left out)"
                    f"; it holds {held}"
                )
            (keys,) = schemes
            tested = [key for key in keys[2:] if key in archive]
            if len(tested) == 1:
                raise InputError(
                    f"{path}: it has {tested[0]}: expected both {keys[2]} and {keys[3]}, or neither"
                )
            return [archive[key] for key in (*keys[:2], *tested)]
    except InputError:
        raise
    except UNREADABLE as error:
        told = str(error)
        if "pickle" in told:  # NumPy's own words advise to load them.
            told = "it is none, or holds pickled objects, which are never loaded"
        raise InputError(f"{path}: cannot be read as a NumPy archive of numbers ({told})") from None


def _call(name: str) -> list[Any]:
    returned = call(name)
    if not isinstance(returned, (tuple, list)) or len(returned) not in (2, 4):
        size = f" of {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise InputError(
            f"{name}: expected (images, labels) or (images, labels, test_images, test_labels), "
            f"got a {type(returned).__name__}{size}"
        )
    try:
        return [
            value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            for value in returned
        ]
    except (TypeError, ValueError) as error:  # A bfloat16 tensor; a list of images of all sizes.
        raise InputError(f"{name} returned what is no array ({error})") from None


def _check(arrays: Sequence[Any], name: str, class_names: tuple[str, ...] = ()) -> Own:
    """Turn images and labels, and perhaps those of a test set, into one of each."""
    images, labels = _check_part(arrays[:2], f"{name}: training")
    classes = _classes(labels, name)
    if len(arrays) == 2:
        order, train_size = _draw_test_set(labels, classes, name)
        return Own(images[order], labels[order], train_size, class_names, True)
    test_images, test_labels = _check_part(arrays[2:], f"{name}: test")
    if test_images.shape[1:] != images.shape[1:]:
        raise InputError(
            f"{name}: a test image has the shape {test_images.shape[1:]}, a training image "
            f"{images.shape[1:]}: expected the same (C, H, W)"
        )
    if test_labels.max() >= classes:
        raise InputError(
            f"{name}: test label {test_labels.max()} is out of range: the training labels go from "
            f"0 to {classes - 1}"
        )
    together = np.concatenate([images, test_images]), np.concatenate([labels, test_labels])
    return Own(*together, len(labels), class_names, False)


def _check_part(arrays: Sequence[Any], what: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = to_bytes(arrays[0], f"{what} images")
    return images, to_labels(arrays[1], len(images), f"{what} labels")


def _classes(labels: NDArray[np.int64], name: str) -> int:
    present = np.unique(labels)
    if len(present) == 1:
        raise InputError(f"{name}: all labels are {present[0]}: expected two classes or more")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise InputError(
            f"{name}: training labels are out of range: {len(present)} different ones should be "
            f"0 to {len(present) - 1}, and no image has {gaps[0]} while one has {present[-1]}; "
            "number the classes from 0 without gaps"
        )
    return len(present)


def _draw_test_set(
    labels: NDArray[np.int64], classes: int, name: str
) -> tuple[NDArray[np.int64], int]:
    """Return the order that puts the test images last, and how many come before them.

    One image in six of each class is drawn, the same ones on every call, so that no class is left
    without training images.
    """
    shuffled = torch.randperm(len(labels), generator=stream(0, "test share", len(labels))).numpy()
    drawn = np.zeros(len(labels), bool)
    for label in range(classes):
        of_class = shuffled[labels[shuffled] == label]
        drawn[of_class[: len(of_class) // _TEST_SHARE]] = True
    if not drawn.any():
        raise InputError(
            f"{name}: no class has {_TEST_SHARE} images, so that one could be set aside for "
            "testing: give a test set"
        )
    order = np.concatenate([np.flatnonzero(~drawn), np.flatnonzero(drawn)])
    return order, int((~drawn).sum())
