import pytest
import torch

from normlab.data import load, scale, split
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
