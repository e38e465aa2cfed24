import dataclasses
import gzip
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.data import load
from normlab.data.cache import read_published
from normlab.data.published import PUBLISHED
from normlab.errors import InputError, NormlabError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_mnist.py"


def test_mnist_is_complete_and_real():
    mnist = load("mnist")
    assert mnist.images.dtype == torch.uint8
    assert mnist.images.shape == (70_000, 1, 28, 28)
    assert (mnist.train_size, mnist.classes, mnist.image_shape) == (60_000, 10, (1, 28, 28))
    train = mnist.images[: mnist.train_size].double() / 255
    # The mean and deviation that everybody normalizes MNIST by.
    assert float(train.mean()) == pytest.approx(0.1307, abs=5e-5)
    assert float(train.std()) == pytest.approx(0.3081, abs=5e-5)
    assert mnist.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.labels[60_000:].bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def bundled_as(path):
    return dataclasses.replace(PUBLISHED["mnist"], bundled=path)


def test_a_changed_array_is_refused(tmp_path):
    with np.load(PUBLISHED["mnist"].bundled) as archive:
        arrays = dict(archive)
    arrays["test_labels"] = arrays["test_labels"].copy()
    arrays["test_labels"][0] ^= 1
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(NormlabError, match=r"test_labels are not the published ones .*: install"):
        read_published(bundled_as(tmp_path / "mnist.npz"))


@pytest.mark.parametrize("content", [None, b"", b"PK not a zip", "cut"])
def test_a_missing_or_damaged_file_is_refused(content, tmp_path):
    whole = PUBLISHED["mnist"].bundled.read_bytes()
    path = tmp_path / "mnist.npz"
    if content is not None:
        path.write_bytes(whole[:1_000_000] if content == "cut" else content)
    with pytest.raises(NormlabError, match=r"mnist.npz: .*: install normlab again"):
        read_published(bundled_as(path))


def test_an_unknown_dataset_is_refused_with_what_is_known():
    with pytest.raises(InputError, match=r"unknown dataset 'mnits' \(did you mean mnist\?\)"):
        load("mnits")


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def run_script(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_rebuilds_the_bundled_file_byte_for_byte(tmp_path, monkeypatch):
    mnist, split = load("mnist"), 60_000
    images, labels = mnist.images.squeeze(1).numpy(), mnist.labels.numpy().astype(np.uint8)
    for name, array in {
        "train-images-idx3-ubyte.gz": images[:split],
        "train-labels-idx1-ubyte": labels[:split],
        "t10k-images-idx3-ubyte": images[split:],
        "t10k-labels-idx1-ubyte.gz": labels[split:],
    }.items():
        content = idx(array)
        packed = gzip.compress(content, compresslevel=1) if name.endswith(".gz") else content
        (tmp_path / name).write_bytes(packed)
    written = {}
    monkeypatch.setattr(
        "normlab.files.replace", lambda path, content: written.update({path: content})
    )
    run_script(tmp_path, monkeypatch)
    (target,) = written
    assert written[target] == target.read_bytes()


def test_the_script_names_what_is_missing_or_cut_short(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        run_script(tmp_path, monkeypatch)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 3, 3), np.uint8))[:-1])
    with pytest.raises(SystemExit, match="cut short"):
        run_script(tmp_path, monkeypatch)
