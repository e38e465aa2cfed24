from typing import NamedTuple

import pytest
import torch
from torch import nn

from normlab.networks import build_network


class Case(NamedTuple):
    network: nn.Module
    state: dict
    x: torch.Tensor
    y: torch.Tensor


@pytest.fixture
def case():
    """A perceptron in float64 with a state that is not its own, and images with labels."""

    def make(arm="batch", activation="relu", network="mlp:8,6"):
        generator = torch.Generator().manual_seed(0)
        built = build_network(
            network, arm, 0, image_shape=(1, 4, 4), classes=3, activation=activation
        ).double()
        state = {
            name: each.detach()
            + 0.3 * torch.rand(each.shape, generator=generator, dtype=each.dtype)
            for name, each in (*built.named_parameters(), *built.named_buffers())
            if each.is_floating_point()
        }
        x = torch.randn(20, 1, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (20,), generator=generator)
        return Case(built, state, x, y)

    return make


@pytest.fixture
def by_hand():
    """The perceptron's pass in training mode, written out; all that it makes, by layer."""

    def run(state, x, y, activation=torch.relu):
        made, h = {}, x.reshape(len(x), -1)
        for block in ("hidden0", "hidden1"):
            h = made[f"{block}.linear"] = (
                h @ state[f"{block}.linear.weight"].T + state[f"{block}.linear.bias"]
            )
            if f"{block}.norm.weight" in state:
                centred = h - h.mean(0)
                normal = centred / (centred.square().mean(0) + 1e-5).sqrt()
                h = made[f"{block}.norm"] = (
                    normal * state[f"{block}.norm.weight"] + state[f"{block}.norm.bias"]
                )
            h = made[f"{block}.activation"] = activation(h)
        h = made["output"] = h @ state["output.weight"].T + state["output.bias"]
        made["loss"] = (h.exp().sum(1).log() - h[torch.arange(len(y)), y]).mean()
        return made

    return run
