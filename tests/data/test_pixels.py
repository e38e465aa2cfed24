import numpy as np
import pytest

from normlab.data.pixels import to_bytes, to_labels
from normlab.errors import InputError


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((7, 4, 5), False), ((7, 1, 4, 5), False), ((7, 3, 4, 5), False), ((7, 4, 5, 1), True),
     ((7, 4, 5, 3), True)],
)  # fmt: skip
def test_channels_are_found_and_put_first(shape, channels_last):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = to_bytes(array, "images")
    assert found.shape == (7, found.shape[1], 4, 5)
    expected = array.transpose(0, 3, 1, 2) if channels_last else array.reshape(found.shape)
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("shape", [(7, 3, 5, 3), (7, 1, 5, 1), (7, 3, 5, 1)])
def test_channels_that_could_be_on_either_axis_are_refused(shape):
    with pytest.raises(InputError, match="second or the last axis may be the channels"):
        to_bytes(np.zeros(shape, np.uint8), "images")


@pytest.mark.parametrize("shape", [(), (7,), (7, 784), (7, 2, 4, 5), (7, 1, 4, 5, 6), (0, 4, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"images have the shape .*: expected"):
        to_bytes(np.zeros(shape, np.uint8), "images")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_bytes_that_were_divided_come_back_exactly(kind):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert np.array_equal(to_bytes((every / 255).astype(kind), "images")[0], every)
    assert np.array_equal(to_bytes(every.astype(kind) * kind(1 / 255), "images")[0], every)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "number 2 has a pixel that is NaN"),
        (np.inf, "NaN or infinite"),
        (-0.1, "expected uint8, or floats from 0 to 1; undo the normalization"),
        (1.01, "from 0 to 1.01 in number 2"),
        (0.5, "number 2 has a pixel that is no byte divided by 255"),
    ],
)
def test_floats_that_are_no_bytes_are_refused(value, message):
    array = np.zeros((4, 5, 6), np.float32)
    array[2, 3, 4] = value
    with pytest.raises(InputError) as raised:
        to_bytes(array, "images")
    assert message in str(raised.value)


@pytest.mark.parametrize("kind", [np.int64, bool, np.uint16, "U3", complex])
def test_other_kinds_of_numbers_are_refused(kind):
    with pytest.raises(InputError, match=r"expected uint8, or floats from 0 to 1; if they are"):
        to_bytes(np.zeros((4, 5, 6)).astype(kind), "images")


def test_labels_may_stand_in_a_column_as_in_keras():
    found = to_labels(np.array([[2], [0]], np.uint8), 2, "labels")
    assert (found.tolist(), found.dtype) == ([2, 0], np.int64)
    with pytest.raises(InputError, match="float64: expected whole numbers from 0"):
        to_labels(np.array([1.0, np.nan]), 2, "labels")
