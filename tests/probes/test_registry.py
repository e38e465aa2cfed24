import random

import pytest
import torch
from torch import nn

from normlab.networks import build_network
from normlab.probes import PROBES, read

LAYERS = (nn.Linear, nn.Conv2d)


def test_nothing_of_the_network_of_the_state_or_of_the_generators_is_changed(case):
    network, state, x, y = case("batch+dropout:0.5")
    network.eval()
    network.hidden0.train()
    kept = {name: each.clone() for name, each in network.state_dict().items()}
    given = {name: each.clone() for name, each in state.items()}
    modes = [each.training for each in network.modules()]
    torch.manual_seed(3)
    generators = torch.get_rng_state(), random.getstate()
    first = read(PROBES, network, state, x, y, 0.1)
    assert list(first) == list(PROBES)
    assert all(first.values())
    assert all(each.equal(kept[name]) for name, each in network.state_dict().items())
    assert all(each.equal(given[name]) for name, each in state.items())
    assert all(each.grad is None for each in network.parameters())
    assert [each.training for each in network.modules()] == modes
    assert not any(
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks
        for each in network.modules()
    )
    assert torch.get_rng_state().equal(generators[0])
    assert random.getstate() == generators[1]
    assert read(PROBES, network.train(), state, x, y, 0.1) == first


def test_a_network_that_draws_leaves_the_global_generators_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            random.random()
            return torch.relu(self.linear(x + torch.randn_like(x)))

    network = Noisy()
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    read(PROBES, network, {}, torch.ones(4, 2), torch.zeros(4).long(), 0.1)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


def test_numbers_that_are_not_finite_are_left_out(case):
    network, state, x, y = case("plain")
    state["output.bias"] = state["output.bias"] * torch.inf
    found = read(PROBES, network, state, x, y, 0.1)
    assert found["smoothness"] == {"": {}}
    assert list(found["gradients"]["output"]) == []
    assert found["percentiles"] == read(["percentiles"], *case("plain"), 0.1)["percentiles"]


@pytest.mark.parametrize("network", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_layers_of_convolutions_are_read_too(network):
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0])
    module = build_network(network, "batch", 0, image_shape=(1, 16, 16), classes=3)
    found = read(["percentiles", "gradients", "units", "covariate-shift"], module, {}, x, y, 0.1)
    activations = [name for name, each in module.named_modules() if isinstance(each, nn.ReLU)]
    assert list(found["percentiles"]) == list(found["units"]) == activations
    weights = [name for name, each in module.named_modules() if isinstance(each, LAYERS)]
    assert set(found["covariate-shift"]) == set(weights[1:])
    assert set(weights) <= set(found["gradients"])
