import math

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from normlab.probes.percentiles import percentiles

NAMES = {"q15": 15, "q50": 50, "q85": 85}


def expected(values):
    """Of values of shape (N, C, …), by NumPy."""
    values = values.detach().numpy().astype(np.float64)
    of_all = {name: np.percentile(values, q) for name, q in NAMES.items()}
    return of_all | {f"unit.{name}": np.percentile(values[:, 0], q) for name, q in NAMES.items()}


@pytest.mark.parametrize("arm", ["batch", "plain", "batch+dropout:0.5"])
def test_they_are_those_of_numpy_of_what_activations_get_in_training(case, by_hand, arm):
    network, state, x, y = case(arm)
    made = by_hand(state, x, y)
    found = percentiles(network, state, x, y, 0.1)
    before = "linear" if arm == "plain" else "norm"
    assert list(found) == ["hidden0.activation", "hidden1.activation"]
    for layer, seen in found.items():
        assert seen == pytest.approx(expected(made[layer.replace("activation", before)]))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 21, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_two_values_they_are_interpolated(n, dtype):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = percentiles(nn.Tanh(), {}, x, torch.zeros(n).long(), 0.1)
    assert found == {"": pytest.approx(expected(x), rel=1e-12)}


def test_a_unit_of_a_convolution_is_a_channel_at_all_its_positions():
    x = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = nn.Sequential(normlab.BatchNorm2d(3, activation="relu"), nn.Flatten()).double()
    bare = normlab.BatchNorm2d(3).double()
    found = percentiles(network, {}, x, torch.zeros(4).long(), 0.1)
    assert found == {"0": pytest.approx(expected(bare(x)))}
    assert network[0].running_mean.equal(torch.zeros(3))


def test_what_is_no_number_has_none():
    x = torch.tensor([[math.nan, 0.0], [1.0, 2.0]])
    found = percentiles(nn.ReLU(), {}, x, torch.zeros(2).long(), 0.1)[""]
    assert all(math.isnan(value) for value in found.values())
