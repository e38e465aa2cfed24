"""Images in a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.data.layouts import UNREADABLE
from normlab.errors import InputError

__all__ = ["read_folder"]

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")


def read_folder(folder: Path) -> tuple[list[NDArray[Any]], tuple[str, ...]]:
    """Read a folder of images by class.

    Args:
        folder: Holds `CLASS/IMAGE`, or `train/CLASS/IMAGE` and perhaps `test/CLASS/IMAGE`. Classes
            are numbered in the order of their names. Hidden files are passed over.

    Returns:
        Images, uint8 (N, H, W) if all are gray, else (N, 3, H, W), and labels, int64; then those
        of the test set if there is one. And the names of the classes.

    Raises:
        InputError: There are no images, one cannot be read or differs in size (it is named), or
            the folder is not of this form.
    """
    entries = _folders(folder)
    if "train" not in [entry.name for entry in entries] or not _folders(folder / "train"):
        parts = [folder]
    else:
        others = [entry.name for entry in entries if entry.name not in ("train", "test")]
        if others:
            raise InputError(
                f"{folder}: beside train there may be test, not {others[0]}: take it away, or move "
                "its images to train, from which validation images are drawn"
            )
        parts = [folder / "train", *([folder / "test"] * (len(entries) > 1))]
    class_names = tuple(entry.name for entry in _folders(parts[0]))
    if not class_names:
        raise InputError(f"{folder}: expected a folder of images for each class; there is none")
    files, labels = [], []
    for part in parts:
        found = _list(part, class_names)
        files.append([file for file, _ in found])
        labels.append(np.array([label for _, label in found], np.int64))
    pixels = _read([file for each in files for file in each])
    split = np.split(pixels, [len(files[0])])[: len(parts)]
    return [each for pair in zip(split, labels, strict=True) for each in pair], class_names


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    return [entry for entry in entries if not entry.name.startswith(".")]


def _list(part: Path, class_names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return the images of a training or test set with their labels."""
    found = []
    for entry in _entries(part):
        if not entry.is_dir():
            raise InputError(f"{entry}: expected only folders here, one for each class")
        if entry.name not in class_names:
            raise InputError(f"{entry}: there are no training images of this class")
        files = _entries(entry)
        if not files:
            raise InputError(f"{entry}: it holds no images")
        found += [(file, class_names.index(entry.name)) for file in files]
    if not found:
        raise InputError(f"{part}: it holds no images")
    return found


def _read(files: list[Path]) -> NDArray[np.uint8]:
    first = _pixels(files[0])
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for number, file in enumerate(files):
        image = _pixels(file)
        if image.shape[:2] != first.shape[:2]:
            sizes = ["×".join(map(str, each.shape[1::-1])) for each in (image, first)]
            raise InputError(
                f"{file} is {sizes[0]}, and {files[0]} is {sizes[1]}: expected images of one size"
            )
        if image.ndim > pixels.ndim - 1:
            # The first one in colour; the gray ones before it lose nothing by that.
            pixels = np.stack([pixels] * 3, axis=-1)
        pixels[number] = image if image.ndim == pixels.ndim - 1 else image[..., None]
    return pixels if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def _pixels(file: Path) -> NDArray[np.uint8]:
    """Return an image as (H, W) if it is gray, else as (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            if image.mode in ("1", "L"):
                return np.asarray(image.convert("L"))
            if image.mode not in ("P", "RGB", "RGBA"):
                raise InputError(
                    f"{file} has pixels of kind {image.mode}: expected 8-bit gray or RGB"
                )
            if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise InputError(f"{file} is partly transparent: put it on a background")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image, or damaged"
        raise InputError(f"{file} cannot be read: {reason}") from None
