import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.data import load, split
from normlab.errors import InputError


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", "").startswith(str(tmp_path)):
            del sys.modules[name]


def images(count=12, *shape):
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, *(shape or (4, 5))), np.uint8)


def labels(count=12):
    return np.arange(count) % 2


TRAIN, TEST = (images(), labels()), (images(6), labels(6))


def refused(name, *parts):
    """The data is refused in one line, which names it and says this."""
    with pytest.raises(InputError) as raised:
        load(name)
    message = str(raised.value)
    assert "\n" not in message
    for part in (name.removeprefix("./"), *parts):
        assert part in message


def save(**arrays):
    np.savez("mine.npz", **arrays)


@pytest.mark.parametrize(
    "keys",
    [
        ("images", "labels", "test_images", "test_labels"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
)
def test_an_archive_under_any_of_the_usual_keys(keys):
    save(**dict(zip(keys, (*TRAIN, *TEST), strict=True)), note=np.array("kept"))
    mine = load("mine.npz")
    assert mine.name == "mine.npz"
    assert mine.images.shape == (18, 1, 4, 5)
    assert mine.images[:, 0].equal(torch.from_numpy(np.concatenate([TRAIN[0], TEST[0]])))
    assert mine.labels.tolist() == [*TRAIN[1], *TEST[1]]
    assert (mine.train_size, mine.classes, mine.test_is_drawn) == (12, 2, False)
    assert mine.labels.dtype == torch.int64


def test_without_a_test_set_a_sixth_of_each_class_becomes_one():
    pictures, classes = images(100), np.array([0] * 60 + [1] * 40)
    save(images=pictures, labels=classes)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    mine = load("mine.npz")
    assert torch.get_rng_state().equal(before)
    assert mine.test_is_drawn
    assert mine.labels[mine.train_size :].bincount().tolist() == [10, 6]
    assert mine.train_size == 84
    kept = {tuple(image.flatten().tolist()) for image in mine.images}
    assert kept == {tuple(image.flatten().tolist()) for image in pictures}
    by_image = {
        tuple(image.flatten().tolist()): label
        for image, label in zip(pictures, classes.tolist(), strict=True)
    }
    assert [by_image[tuple(i.flatten().tolist())] for i in mine.images] == mine.labels.tolist()
    # Pinned: the numbers of studies on such data rest on it.
    first = mine.images[mine.train_size, 0].numpy()
    assert [i for i in range(100) if np.array_equal(pictures[i], first)] == [2]


def test_a_test_set_needs_six_images_of_a_class():
    save(images=images(10), labels=labels(10))
    refused("mine.npz", "no class has 6 images", "give a test set")


def test_the_digest_is_that_of_what_is_in_the_files_not_of_where_they_are(tmp_path):
    save(images=TRAIN[0], labels=TRAIN[1])
    first = load("mine.npz")
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.npz").rename(tmp_path / "moved" / "other.npz")
    moved = load("moved/other.npz")
    assert (moved.digest, moved.name) == (first.digest, "moved/other.npz")
    held_out = [split(each, 3).indices["validation"].tolist() for each in (first, moved)]
    assert held_out[0] == held_out[1]
    changed = TRAIN[0].copy()
    changed[3, 2, 1] ^= 1
    save(images=changed, labels=TRAIN[1])
    assert load("mine.npz").digest != first.digest
    save(images=TRAIN[0], labels=1 - TRAIN[1])
    assert load("mine.npz").digest != first.digest
    assert load("mnist").digest is None


def test_data_is_read_once_until_its_files_change():
    save(images=TRAIN[0], labels=TRAIN[1])
    assert load("mine.npz") is load("mine.npz")
    first = load("mine.npz")
    save(images=images(24), labels=labels(24))
    assert len(load("mine.npz").images) == 24
    assert len(first.images) == 12


def module(name, *lines):
    Path(f"{name}.py").write_text("\n".join(["import numpy, torch", "def make():", *lines, ""]))
    return f"{name}:make"


@pytest.mark.parametrize(
    "kind",
    ["numpy.arange(12 * 20).reshape(12, 4, 5).astype('uint8')",
     "torch.arange(12 * 20, dtype=torch.uint8).reshape(12, 1, 4, 5)"],
)  # fmt: skip
def test_a_function_of_a_module_beside_the_user(kind):
    path_before = list(sys.path)
    name = module("beside", f"  return {kind}, torch.arange(12) % 2")
    mine = load(name)
    assert sys.path == path_before
    assert mine.images.shape == (12, 1, 4, 5)
    assert mine.images.sort(0).values[0].flatten().tolist() == list(range(20))
    with_test = module("both", f"  x, y = {kind}, torch.arange(12) % 2", "  return x, y, x, y")
    assert (load(with_test).train_size, len(load(with_test).labels)) == (12, 24)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise ValueError('no such disk')", "raised ValueError: no such disk"),
        ("return 3", "got a int"),
        ("return 1, 2, 3", "got a tuple of 3"),
        ("return 1, 2", "training images have the shape ()"),
        (
            "return [numpy.zeros((2, 2)), numpy.zeros((3, 3))], [0, 1]",
            "returned what is no array (setting an array element with a sequence",
        ),
        (
            "return torch.zeros(2, 3, 3, dtype=torch.bfloat16), [0, 1]",
            "returned what is no array (Got unsupported ScalarType BFloat16)",
        ),
    ],
)
def test_a_function_that_fails_or_returns_something_else(line, message):
    refused(module("failing", f"  {line}"), message)


def test_a_module_or_function_that_is_not_there():
    refused("absent_module:make", "cannot be imported (ModuleNotFoundError")
    module("present", "  pass")
    refused("present:mkae", "present has no mkae (did you mean make?)")
    Path("broken.py").write_text("1 +")
    refused("broken:make", "broken cannot be imported (SyntaxError")


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({}, ["it holds nothing"]),
        ({"images": TRAIN[0]}, ["expected images and labels under one of", "it holds images"]),
        ({"x": TRAIN[0], "y": TRAIN[1]}, ["it holds x, y"]),
        (
            {"images": TRAIN[0], "labels": TRAIN[1], "test_images": TEST[0]},
            ["it has test_images: expected both test_images and test_labels, or neither"],
        ),
        (
            {"images": TRAIN[0], "labels": TRAIN[1], "x_train": TRAIN[0], "y_train": TRAIN[1]},
            ["under one of"],
        ),
        ({"images": TRAIN[0], "labels": np.zeros(12, int)}, ["all labels are 0"]),
        ({"images": TRAIN[0], "labels": TRAIN[1] + 1}, ["out of range", "no image has 0"]),
        ({"images": TRAIN[0], "labels": TRAIN[1] * 2}, ["no image has 1 while one has 2"]),
        ({"images": TRAIN[0], "labels": TRAIN[1] - 1}, ["-1 is out of range"]),
        ({"images": TRAIN[0], "labels": TRAIN[1] / 3}, ["float64: expected whole numbers"]),
        ({"images": TRAIN[0], "labels": TRAIN[1][:5]}, ["there are 5, and 12 images"]),
        ({"images": TRAIN[0], "labels": np.eye(12)}, ["one-hot", "(12, 12)"]),
        ({"images": TRAIN[0][:0], "labels": TRAIN[1][:0]}, ["expected one or more"]),
        (
            {"images": TRAIN[0], "labels": TRAIN[1], "test_images": TEST[0],
             "test_labels": TEST[1] * 7},
            ["test label 7 is out of range", "0 to 1"],
        ),
        (
            {"images": TRAIN[0], "labels": TRAIN[1], "test_images": images(6, 5, 4),
             "test_labels": TEST[1]},
            ["a test image has the shape (1, 5, 4), a training image (1, 4, 5)"],
        ),
        ({"images": np.array([{}] * 12), "labels": TRAIN[1]}, ["pickled objects, which are never"]),
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_used(arrays, parts):
    save(**arrays)
    refused("mine.npz", *parts)


@pytest.mark.parametrize("content", [b"", b"text", "cut"])
def test_a_file_that_is_no_archive(content, tmp_path):
    save(images=TRAIN[0], labels=TRAIN[1])
    path = tmp_path / "mine.npz"
    path.write_bytes(path.read_bytes()[:-300] if content == "cut" else content)
    refused("mine.npz", "cannot be read as a NumPy archive of numbers")


def test_a_path_that_is_not_there_or_of_another_kind(tmp_path):
    refused("absent.npz", "there is no such file or folder")
    refused("./absent", "there is no such file or folder")
    (tmp_path / "mine.csv").write_text("1,2\n")
    refused("./mine.csv", "expected a file that ends in .npz, or a folder of images")
    (tmp_path / "empty").mkdir()
    refused("./empty", "empty: expected a folder of images for each class")


def test_a_bare_name_is_no_path(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match=r"unknown dataset 'pictures': .* a folder \(./pictures\)"):
        load("pictures")
