import pytest
import torch
from torch import nn

from normlab.probes import Units
from normlab.probes.units import units


def test_a_unit_is_silent_if_every_batch_has_it_at_zero():
    units = Units("relu")
    units.see(torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]))
    assert units.silent.tolist() == [True, False, True]
    units.see(torch.tensor([[[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]]))
    units.see(torch.zeros(1, 3, 2))
    assert units.silent.tolist() == [True, False, False]
    assert units.values == 6


def test_flat_values_are_those_with_a_small_derivative():
    x = torch.tensor([[-5.0, 0.0], [4.7, 4.5]])  # σ′ is 0.0066, ¼, 0.0089, 0.0109.
    sigmoid, tanh = Units("sigmoid"), Units("tanh")
    sigmoid.see(torch.sigmoid(x))
    tanh.see(torch.tanh(x / 2))
    assert sigmoid.flat.tolist() == tanh.flat.tolist() == [2, 0]


def test_scalars_and_empty_batches_are_passed_over():
    units = Units("relu")
    units.see(torch.ones(()))
    units.see(torch.ones(0, 3))
    assert units.values == 0


@pytest.mark.parametrize("arm", ["batch", "plain", "batch+dropout:0.5"])
def test_shares_are_those_of_the_pass_written_out(case, by_hand, arm):
    network, state, x, y = case(arm)
    for i in range(3):  # Below the least that any image can make of them.
        key = "hidden0.linear.bias" if arm == "plain" else "hidden0.norm.bias"
        state[key][i] = -100
    made = by_hand(state, x, y)
    found = units(network, state, x, y, 0.1)
    assert list(found) == ["hidden0.activation", "hidden1.activation"]
    for layer, seen in found.items():
        dead = (made[layer] == 0).all(0).double().mean().item()
        assert seen == {"dead": dead}
    assert found["hidden0.activation"]["dead"] >= 3 / 8


@pytest.mark.parametrize(("kind", "scale"), [("sigmoid", 1), ("tanh", 2)])
def test_a_unit_is_saturated_with_more_than_95_in_100_values_on_the_flat_parts(kind, scale):
    x = torch.zeros(100, 4, dtype=torch.float64)
    for unit, flat in enumerate((100, 96, 95, 0)):
        x[:flat, unit] = 4.7 / scale
    network = nn.Sequential({"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[kind]())
    found = units(network, {}, x, torch.zeros(100).long(), 0.1)
    assert found == {"0": {"saturated": 0.5}}


def test_activations_without_flat_parts_or_zeros_have_no_shares():
    network = nn.Sequential(nn.GELU(), nn.LeakyReLU(), nn.ReLU())
    found = units(network, {}, -torch.ones(2, 3), torch.zeros(2).long(), 0.1)
    assert found == {"2": {"dead": 1.0}}
