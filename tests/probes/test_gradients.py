import pytest
import torch
from torch import nn

from normlab.probes.gradients import gradients


@pytest.mark.parametrize("arm", ["batch", "plain", "batch+dropout:0.5"])
def test_they_are_those_of_autograd_on_the_pass_written_out(case, by_hand, arm):
    network, state, x, y = case(arm)
    leaves = {name: each.clone().requires_grad_() for name, each in state.items()}
    made = by_hand(leaves, x, y)
    for each in made.values():
        each.retain_grad()
    made["loss"].backward()
    expected = {}
    for name, output in made.items():
        if name != "loss":
            of_the_sum = output.grad * len(x)
            expected[name] = {"output": of_the_sum.square().sum(1).mean().item()}
    for name, _ in network.named_parameters():
        layer, _, parameter = name.rpartition(".")
        expected[layer][parameter] = leaves[name].grad.norm().item()
    found = gradients(network, state, x, y, 0.1)
    assert list(found) == list(expected)
    for layer, seen in found.items():
        assert seen == pytest.approx(expected[layer], rel=1e-9, abs=1e-12)


def test_more_of_the_same_images_change_nothing(case):
    network, state, x, y = case()
    once = gradients(network, state, x, y, 0.1)
    twice = gradients(network, state, torch.cat([x, x]), torch.cat([y, y]), 0.1)
    assert twice.keys() == once.keys()
    for layer, seen in twice.items():
        assert seen == pytest.approx(once[layer], rel=1e-9, abs=1e-12)


def test_of_an_output_that_is_overwritten_it_is_the_gradient_of_what_was_returned():
    def run(inplace):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3))
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        return gradients(network, {}, x, torch.tensor([0, 1, 2, 0, 1, 2]), 0.1)

    found = run(inplace=True)
    assert found == run(inplace=False)
    assert 0 < found["0"]["output"] < found["1"]["output"]


def test_a_frozen_or_unused_parameter_has_no_gradient_or_a_gradient_of_zeros():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(1, 1)
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.last(self.first(x))

    found = gradients(Net(), {}, torch.ones(2, 4), torch.zeros(2).long(), 0.1)
    assert list(found) == ["last", "unused"]
    assert found["unused"] == {"weight": 0.0, "bias": 0.0}
