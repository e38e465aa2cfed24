"""A user's arrays as the bytes and class numbers that normlab keeps, or a line on why not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import InputError

__all__ = ["to_bytes", "to_labels"]

_CHANNELS = (1, 3)


def to_bytes(images: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Return images as bytes, shape (N, C, H, W).

    Args:
        images: uint8, or floats k/255 up to their rounding, for whole k from 0 to 255. Shape
            (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3; the axis that has this size is
            the channels', and if both the second and the last have, nothing tells.
        what: Names them in messages.

    Raises:
        InputError: They are something else; bytes that only come near are never made of them.

    >>> to_bytes(np.array([[[0.0, 0.2], [0.4, 1.0]]]), "images").tolist()
    [[[[0, 51], [102, 255]]]]
    """
    return np.ascontiguousarray(_as_bytes(_channels_first(images, what), what))


def _channels_first(array: NDArray[Any], what: str) -> NDArray[Any]:
    if 0 in array.shape:
        raise InputError(f"{what} have the shape {array.shape}: expected one or more")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4:
        raise InputError(
            f"{what} have the shape {array.shape}: expected (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    first, last = array.shape[1] in _CHANNELS, array.shape[3] in _CHANNELS
    if first and last:
        raise InputError(
            f"{what} have the shape {array.shape}, in which the second or the last axis may be the "
            "channels: add pixels around the images, or give (N, H, W)"
        )
    if not (first or last):
        raise InputError(
            f"{what} have the shape {array.shape}: expected 1 or 3 channels on the second or the "
            "last axis"
        )
    return array if first else array.transpose(0, 3, 1, 2)


def _as_bytes(array: NDArray[Any], what: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{what} are {array.dtype}: expected uint8, or floats from 0 to 1; if they are bytes, "
            "convert them with .astype('uint8')"
        )
    pixels = np.empty(array.shape, np.uint8)
    for number, image in enumerate(array):  # One at a time: no second copy in floats.
        if not np.isfinite(image).all():
            raise InputError(f"{what}: number {number} has a pixel that is NaN or infinite")
        if image.min() < 0 or image.max() > 1:
            raise InputError(
                f"{what} are {array.dtype} from {image.min():g} to {image.max():g} in number "
                f"{number}: expected uint8, or floats from 0 to 1; undo the normalization"
            )
        rounded = np.rint(image.astype(np.float64) * 255)
        if np.abs(image - rounded / 255).max() > np.finfo(array.dtype).eps:
            raise InputError(
                f"{what}: number {number} has a pixel that is no byte divided by 255, and rounding "
                "would change your data: give uint8, for instance np.rint(images * 255)"
                ".astype('uint8') if that is near enough for you"
            )
        pixels[number] = rounded
    return pixels


def to_labels(labels: NDArray[Any], count: int, what: str) -> NDArray[np.int64]:
    """Return labels as int64, shape (N,).

    Args:
        labels: Integers of any kind from 0, shape (N,) or (N, 1).
        count: Of the images.
        what: Names them in messages.

    Raises:
        InputError: They are not that.

    >>> to_labels(np.array([[3], [0]], np.uint8), 2, "labels").tolist()
    [3, 0]
    """
    array = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if array.ndim != 1:
        raise InputError(
            f"{what} have the shape {array.shape}: expected one number an image, shape (N,); of "
            "one-hot rows take .argmax(axis=1)"
        )
    if len(array) != count:
        raise InputError(f"{what}: there are {len(array)}, and {count} images")
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{what} are {array.dtype}: expected whole numbers from 0")
    if array.min() < 0:
        raise InputError(f"{what}: {array.min()} is out of range: expected whole numbers from 0")
    return array.astype(np.int64)
