"""Rebuild `src/normlab/data/mnist.npz` from the four IDX files, gzipped or not.

    python scripts/build_mnist.py FOLDER

FOLDER holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
t10k-labels-idx1-ubyte, as MNIST's authors published them (with or without `.gz`).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np

from normlab.data.layouts import read_idx
from normlab.files import replace

TARGET = Path(__file__).parents[1] / "src" / "normlab" / "data" / "mnist.npz"
SOURCES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def main(folder: Path) -> None:
    """Write the bundled file; the same input gives the same bytes."""
    arrays = {}
    for key, name in SOURCES.items():
        try:
            arrays[key] = read_idx(folder / name)
        except FileNotFoundError:
            raise SystemExit(f"{folder}: neither {name} nor {name}.gz is there") from None
        except ValueError as error:
            raise SystemExit(f"{folder}: {error}") from None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    replace(TARGET, buffer.getvalue())
    print(f"{TARGET}: {len(buffer.getvalue()) / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
