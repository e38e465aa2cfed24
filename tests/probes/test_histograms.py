import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from normlab.networks import build_network
from normlab.probes import histogram, inside


@given(st.lists(st.integers(-1000, 1000), min_size=2))
def test_counts_are_those_of_numpy(values):
    # Powers of two, so that no bin's edge is a matter of roundings.
    values = np.array([*values, -1024, 1024]) / 2**20
    found = histogram(torch.tensor(values))
    counts, edges = np.histogram(values, bins=30)
    assert (found.low, found.high) == (edges[0], edges[-1])
    off = np.abs(np.cumsum(found.counts) - np.cumsum(counts))
    at_edges = [(np.abs(values - edge) < 1e-12).sum() for edge in edges[1:]]
    assert (off <= at_edges).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_lost(dtype):
    values = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = histogram(values)
    assert sum(found.counts) == 7000
    assert (found.low, found.high) == (float(values.min()), float(values.max()))
    half = sum(found.counts[:15]) / 7000
    middle = (found.low + found.high) / 2
    assert half == pytest.approx(float((values < middle).float().mean()), abs=0.01)


def test_what_is_not_finite_is_left_out():
    found = histogram(torch.tensor([math.nan, 0.0, math.inf, 1.0, -math.inf]))
    assert found == (0.0, 1.0, [1, *[0] * 28, 1])
    assert histogram(torch.tensor([math.nan])) is None
    assert histogram(torch.empty(0)) is None


def test_values_that_are_all_alike_are_in_the_last_bin():
    assert histogram(torch.full((2, 3), 0.1, dtype=torch.float64)) == (0.1, 0.1, [0] * 29 + [6])


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-45, torch.float32), (3e38, torch.float32), (1e-300, None), (1.7e308, None)],
)
def test_the_smallest_and_the_largest_numbers_have_their_bins(scale, dtype):
    found = histogram(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).mul(scale).to(dtype))
    assert (found.counts[0], found.counts[-1]) == (1, 2)


def test_a_networks_inside_is_that_of_the_state_given():
    network = build_network("mlp:8", "batch", 0, image_shape=(1, 4, 4), classes=3).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    state = {"hidden0.norm.weight": torch.full((8,), 2.0), "hidden0.norm.bias": torch.arange(8.0)}
    found = inside(network, state, x)
    assert list(found) == ["hidden0.linear", "hidden0.norm", "hidden0.activation", "output"]
    assert list(found["hidden0.linear"]) == ["output"]
    norm = found["hidden0.norm"]
    assert norm["weight"] == histogram(torch.full((8,), 2.0))
    assert norm["bias"] == histogram(torch.arange(8.0))
    assert sum(norm["output"].counts) == 16 * 8
    assert norm["output"] != inside(network, {}, x)["hidden0.norm"]["output"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_that_is_called_twice_is_seen_at_its_first_call_before_it_is_overwritten():
    shared = nn.ReLU(inplace=True)
    network = nn.Sequential(nn.Hardtanh(-1, 3), shared, nn.Linear(2, 2), shared)
    x = torch.tensor([[-1.0, 3.0]])
    found = inside(network, {}, x)
    assert found["0"]["output"] == histogram(x)
    assert found["1"]["output"] == histogram(x.relu())


def test_a_norm_that_holds_its_activation_is_seen_with_it():
    class Activated(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(2)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    found = inside(nn.Sequential(Activated()).eval(), {}, torch.ones(3, 2))
    assert {layer: list(seen) for layer, seen in found.items()} == {
        "0.act": ["output"],
        "0": ["output", "weight", "bias"],
    }


def test_whole_numbers_and_tuples_are_passed_over():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn, self.last = nn.Hardtanh(), nn.LSTM(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.rnn(self.first(x).float())[0])

    assert list(inside(Words(), {}, torch.ones(3, 2, dtype=torch.int64))) == ["last"]


def test_layers_that_return_what_they_get_are_passed_over():
    layers = [nn.Flatten(), nn.Identity(), nn.Linear(4, 2), nn.Dropout(), nn.ReLU()]
    assert list(inside(nn.Sequential(*layers).eval(), {}, torch.ones(3, 2, 2))) == ["2", "4"]
