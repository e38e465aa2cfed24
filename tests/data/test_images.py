import numpy as np
import pytest
from PIL import Image

from normlab.data import load
from normlab.errors import InputError


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder `pictures`; its function saves an image of one colour to a path in it."""
    monkeypatch.chdir(tmp_path)

    def save(name, colour=0, mode="L", size=(6, 4), **options):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path, **options)
        return path

    return save


def some(save, *parts, count=6, **options):
    for part in parts:
        for number in range(count):
            save(f"{part}/{number}.png", **options)


def refused(*parts):
    with pytest.raises(InputError) as raised:
        load("./pictures")
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_a_folder_for_each_class(pictures):
    for number in range(12):
        pictures(f"cat/{number:02}.png", number)
        pictures(f"ant/{number:02}.png", 100 + number)
    (pictures("cat/00.png").parent / ".hidden").write_text("not an image")
    mine = load("./pictures")
    assert mine.class_names == ("ant", "cat")
    assert mine.images.shape == (24, 1, 4, 6)
    assert (mine.train_size, mine.test_is_drawn) == (20, True)
    assert mine.labels.tolist() == [int(value < 100) for value in mine.images[:, 0, 0, 0].tolist()]
    assert set(mine.images[:, 0, 0, 0].tolist()) == {*range(12), *range(100, 112)}


def test_folders_for_training_and_test_images(pictures):
    some(pictures, "train/a", "train/b", count=3, colour=1)
    some(pictures, "test/b", count=2, colour=9)
    mine = load("./pictures")
    assert (mine.train_size, len(mine.labels), mine.test_is_drawn) == (6, 8, False)
    assert mine.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert mine.images[:, 0, 0, 0].tolist() == [1] * 6 + [9] * 2


def test_training_images_alone_in_their_folder(pictures):
    some(pictures, "train/a", "train/b")
    assert load("./pictures").test_is_drawn


def test_gray_among_colour_becomes_colour(pictures):
    some(pictures, "a", colour=7)
    some(pictures, "b", mode="RGB", colour=(1, 2, 3))
    pictures("b/9.png", (4, 5, 6, 255), "RGBA")
    pictures("b/8.png", 1, "1")
    pictures("b/7.jpg", (9, 9, 9), "RGB", quality=100)
    mine = load("./pictures")
    assert mine.images.shape == (15, 3, 4, 6)
    assert {tuple(image[:, 1, 2].tolist()) for image in mine.images} == {
        (7, 7, 7), (1, 2, 3), (4, 5, 6), (255, 255, 255), (9, 9, 9)
    }  # fmt: skip


def test_a_changed_image_is_seen(pictures):
    some(pictures, "a", "b")
    first = load("./pictures")
    pictures("a/0.png", 200)
    again = load("./pictures")
    assert again.digest != first.digest
    assert int(again.images.max()) == 200


def test_an_unreadable_file_among_good_ones_is_named(pictures):
    some(pictures, "a", "b")
    path = pictures("b/5.png", size=(60, 40))
    path.write_bytes(path.read_bytes()[:60])
    refused("pictures/b/5.png cannot be read")
    path.write_text("no image")
    refused("pictures/b/5.png cannot be read: it is no image, or damaged")


def test_images_of_unequal_size_are_named(pictures):
    some(pictures, "a", "b")
    pictures("b/3.png", size=(7, 4))
    refused("pictures/b/3.png is 7×4, and pictures/a/0.png is 6×4: expected images of one size")


def test_pixels_that_would_lose_something_are_refused(pictures):
    some(pictures, "a", "b")
    pictures("b/3.png", (1, 2, 3, 100), "RGBA")
    refused("pictures/b/3.png is partly transparent")
    Image.fromarray(np.full((4, 6), 300, np.uint16)).save("pictures/b/3.png")
    refused("pictures/b/3.png has pixels of kind I;16: expected 8-bit gray or RGB")


def test_folders_that_are_not_of_this_form(pictures, tmp_path):
    some(pictures, "train/a", "train/b", "val/a")
    refused("beside train there may be test, not val")
    (tmp_path / "pictures" / "val").rename(tmp_path / "pictures" / "test")
    some(pictures, "test/c")
    refused("pictures/test/c: there are no training images of this class")


def test_folders_without_images(pictures, tmp_path):
    some(pictures, "a")
    refused("all labels are 0: expected two classes or more")
    (tmp_path / "pictures" / "b").mkdir()
    refused("pictures/b: it holds no images")
    (tmp_path / "pictures" / "b").rmdir()
    (tmp_path / "pictures" / "readme.txt").write_text("")
    refused("readme.txt: expected only folders here, one for each class")
