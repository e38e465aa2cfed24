import pytest
import torch

from normlab.data import gather, load, scale, split, splits
from normlab.errors import InputError


def test_splits_share_no_image_and_leave_none_out():
    splits = split(load("mnist"), 5000)
    assert [splits.size(name) for name in ("train", "validation", "test")] == [55_000, 5000, 10_000]
    everything = torch.cat(list(splits.indices.values()))
    assert everything.sort().values.equal(torch.arange(70_000))
    assert splits.indices["test"].equal(torch.arange(60_000, 70_000))


def test_the_validation_images_are_the_same_ones_every_time():
    torch.manual_seed(1)
    first = split(load("mnist"), 5000).indices["validation"]
    torch.manual_seed(2)
    assert first.equal(split(load("mnist"), 5000).indices["validation"])
    # Pinned, because every study's numbers rest on it.
    assert first[:5].tolist() == [9, 66, 72, 87, 106]
    assert not first.equal(torch.arange(55_000, 60_000))


def test_validation_can_be_nothing():
    assert list(split(load("mnist"), 0).indices) == ["train", "test"]


@pytest.mark.parametrize("validation", [-1, 60_000, 70_000])
def test_validation_must_leave_something_to_train_on(validation):
    with pytest.raises(InputError, match="0 to 59999 can be held out"):
        split(load("mnist"), validation)


def test_scaling_reaches_both_ends():
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert scale(bytes_, "0..1").tolist() == pytest.approx([0, 0.2, 1])
    assert scale(bytes_, "-1..1").tolist() == pytest.approx([-1, -0.6, 1])
    assert bytes_.tolist() == [0, 51, 255]


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("scaling", ["0..1", "-1..1"])
def test_images_are_gathered_and_scaled_as_one_after_the_other(monkeypatch, built, scaling):
    monkeypatch.setattr(splits, "BUILT", built and splits.BUILT)
    images = load("mnist").images[:50]
    indices = torch.tensor([49, 0, 7, 7])
    expected = scale(images[indices], scaling)
    # A product and a sum may be rounded once.
    torch.testing.assert_close(gather(images, indices, scaling), expected, rtol=0, atol=2e-7)
    turned = images.transpose(2, 3)
    assert gather(turned, indices, scaling).equal(scale(turned[indices], scaling))
    assert gather(images, indices[:0], scaling).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("index", [50, -51])
def test_an_image_that_is_not_there_is_an_error(index):
    with pytest.raises(IndexError):
        gather(load("mnist").images[:50], torch.tensor([3, index]), "0..1")
