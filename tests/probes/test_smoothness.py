import math

import numpy as np
import pytest
import torch
from torch import nn

from normlab.probes.smoothness import smoothness

RELATIVE = np.geomspace(1e-4, 1e-1, 5)


def expected(state, trained, by_hand, x, y, lr):
    def loss_and_gradient(weights):
        leaves = {name: each.clone().requires_grad_() for name, each in weights.items()}
        loss = by_hand({**state, **leaves}, x, y)["loss"]
        loss.backward()
        return loss.item(), {name: each.grad for name, each in leaves.items()}

    def length(tensors):
        return math.sqrt(sum((each**2).sum().item() for each in tensors.values()))

    start = {name: state[name] for name in trained}
    _, slope = loss_and_gradient(start)
    found = {}
    for prefix, steps in (
        ("", np.linspace(0.1, 4, 5) * lr),
        ("relative.", RELATIVE * length(start) / length(slope)),
    ):
        losses, changes = [], []
        for step in steps:
            loss, there = loss_and_gradient({n: start[n] - step * slope[n] for n in start})
            losses.append(loss)
            changes.append(length({n: there[n] - slope[n] for n in start}))
        found[f"{prefix}loss.range"] = max(losses) - min(losses)
        found[f"{prefix}gradient.change"] = max(changes)
    return found


@pytest.mark.parametrize("arm", ["batch", "plain", "batch+dropout:0.5"])
@pytest.mark.parametrize("lr", [0.5, 0.001])
def test_it_is_that_of_the_pass_written_out(case, by_hand, arm, lr):
    network, state, x, y = case(arm)
    trained = [name for name, _ in network.named_parameters()]
    found = smoothness(network, state, x, y, lr)
    assert list(found) == [""]
    assert found[""] == pytest.approx(expected(state, trained, by_hand, x, y, lr), rel=1e-8)


def test_relative_steps_do_not_see_the_scale_of_weights_before_a_norm(case):
    network, state, x, y = case()
    # All of the length that counts is in the weights before norms, so that both are the same way.
    for name, each in network.named_parameters():
        each.requires_grad_(name in ("hidden0.linear.weight", "hidden1.linear.weight"))
        if name.endswith("linear.bias"):
            state[name] = torch.zeros_like(each)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.eps = 1e-30
    small = smoothness(network, state, x, y, 0.1)[""]
    for name in ("hidden0.linear.weight", "hidden1.linear.weight"):
        state[name] = 10 * state[name]
    large = smoothness(network, state, x, y, 0.1)[""]
    assert large["relative.loss.range"] == pytest.approx(small["relative.loss.range"], rel=1e-8)
    assert large["loss.range"] < small["loss.range"] / 50


def test_where_there_is_no_slope_there_is_no_relative_way():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    state = {"2.weight": torch.zeros(2, 2), "0.weight": -torch.ones(2, 2), "0.bias": torch.zeros(2)}
    found = smoothness(network, state, torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), 0.1)[""]
    assert (found["loss.range"], found["gradient.change"]) == (0, 0)
    assert math.isnan(found["relative.loss.range"])
    assert math.isnan(found["relative.gradient.change"])
