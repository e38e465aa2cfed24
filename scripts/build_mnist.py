"""Rebuild `src/normlab/data/mnist.npz` from the four IDX files, gzipped or not.

    python scripts/build_mnist.py FOLDER

FOLDER holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte, as MNIST's authors published them (with or without `.gz`).
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.files import replace

TARGET = Path(__file__).parents[1] / "src" / "normlab" / "data" / "mnist.npz"
SOURCES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: a magic number, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, rank = struct.unpack_from(">HBB", raw)
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if zero != 0 or kind != 0x08 or values.size != np.prod(shape):
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return values.reshape(shape)


def main(folder: Path) -> None:
    """Write the bundled file; the same input gives the same bytes."""
    arrays = {}
    for key, name in SOURCES.items():
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        if not found:
            raise SystemExit(f"{folder}: neither {name} nor {name}.gz is there")
        arrays[key] = read_idx(found[0])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    replace(TARGET, buffer.getvalue())
    print(f"{TARGET}: {len(buffer.getvalue()) / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
