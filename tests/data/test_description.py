import io

import numpy as np
import pytest
import torch
from PIL import Image

from normlab.data import Dataset, contact_sheet, describe


def dataset(images, labels, train_size, **facts):
    images, labels = torch.as_tensor(images, dtype=torch.uint8), torch.tensor(labels)
    return Dataset("mine", images, labels, train_size, classes=int(labels.max()) + 1, **facts)


def test_counts_mean_and_deviation_are_those_of_the_arrays():
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 5, 4), np.uint8)
    labels = [number % 3 for number in range(2500)]
    described = describe(dataset(images, labels, 2200))
    scaled = images[:2200] / 255
    assert described.mean == pytest.approx(scaled.mean((0, 2, 3)), rel=1e-12)
    assert described.deviation == pytest.approx(scaled.std((0, 2, 3)), rel=1e-10)
    assert described.train == np.bincount(labels[:2200]).tolist()
    assert described.test == np.bincount(labels[2200:]).tolist()
    assert described.image_shape == (3, 5, 4)
    assert described.class_names == ("0", "1", "2")


def test_words_say_what_was_drawn_and_what_it_is_known_by():
    images = torch.zeros(8, 1, 2, 3)
    mine = dataset(
        images, [0, 1] * 4, 6, class_names=("ant", "bee"), digest="ab12", test_is_drawn=True
    )
    lines = str(describe(mine)).splitlines()
    assert lines[0] == "mine: 6 training and 2 test images (one of six of each class, drawn here)"
    assert lines[1] == "images: 3×2, gray, mean 0.0000, deviation 0.0000"
    assert lines[2] == "SHA-256: ab12"
    assert lines[-3].split() == ["ant", "3", "1"]
    assert lines[-1].split() == ["all", "6", "2"]
    assert "drawn" not in str(describe(dataset(images, [0, 1] * 4, 6)))


def pixels(sheet):
    with Image.open(io.BytesIO(sheet)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_sheet_has_a_row_of_training_images_for_each_class():
    colours = [[200, 0, 0], [0, 200, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200]]
    images = np.array(colours, np.uint8)[:, :, None, None] * np.ones((1, 1, 20, 20), np.uint8)
    sheet = pixels(contact_sheet(dataset(images, [0, 1, 0, 1, 0], 4), columns=3))
    red, green, blue = (
        np.argwhere((sheet == colour).all(-1)) for colour in (colours[0], colours[1], colours[4])
    )
    # Two images each of 20×20, enlarged three times; the test image is not among them.
    assert len(red) == len(green) == 2 * 60 * 60
    assert len(blue) == 0
    assert red[:, 0].max() < green[:, 0].min()


def plum(count, *size):
    """Images of a colour that no letter has, and how many of its pixels a sheet shows."""
    colour = torch.tensor([77, 1, 200])
    images = colour[None, :, None, None].expand(count, 3, *size)
    return images, lambda sheet: int((pixels(sheet) == colour.numpy()).all(-1).sum())


@pytest.mark.parametrize(("size", "shown"), [((28, 28), 56), ((64, 64), 64), ((480, 480), 96)])
def test_images_on_the_sheet_are_neither_tiny_nor_huge(size, shown):
    images, count = plum(2, *size)
    assert count(contact_sheet(dataset(images, [0, 1], 2), columns=1)) == 2 * shown**2


def test_classes_beyond_the_rows_are_left_out():
    images, count = plum(70, 50, 50)
    assert count(contact_sheet(dataset(images, list(range(70)), 70), columns=1)) == 50 * 50**2
