import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.data import load, scale, split
from normlab.errors import InputError
from normlab.networks import build_network
from normlab.training import Engine, Recipe, Replica, program
from normlab.training.agreement import agrees_with_the_module
from normlab.training.engine import build_fleet


def rounded(tensor):
    return tensor.to(torch.bfloat16)


def run(network, code, batch, precision="bfloat16", width=1):
    images, labels = load("mnist").images[:64], load("mnist").labels[:64]
    state = [each.detach() for each in (*network.parameters(), *network.buffers())]
    if width > 1:
        state, batch = [torch.stack([each] * width) for each in state], batch.expand(width, -1)
    tensors = [images, labels, *(each.clone() for each in state), batch]
    network.train()
    return program.make(network, width, "0..1", tensors, code, precision)(tensors)


def moved(network, code, width):
    """What two passes return, one after the other, and the state that they moved."""
    network.train()
    images, labels = load("mnist").images[:64], load("mnist").labels[:64]
    state = [each.detach() for each in (*network.parameters(), *network.buffers())]
    batch = torch.arange(32)
    if width > 1:
        state, batch = [torch.stack([each] * width) for each in state], batch.expand(width, -1)
    tensors = [images, labels, *(each.clone() for each in state), batch]
    made = program.make(network, width, "0..1", tensors, code)
    return [*made(tensors), *made(tensors), *tensors]


@pytest.mark.parametrize("code", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def test_in_bfloat16_only_factors_of_products_are_rounded(code):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    batch = torch.arange(32)
    loss, by_weight, by_bias, hits = run(network, code, batch)
    x, y = scale(load("mnist").images[:32], "0..1").flatten(1), load("mnist").labels[:32]
    weight, bias = (each.detach() for each in network.parameters())
    logits = (rounded(x) @ rounded(weight).T).float() + bias
    grad = (logits.softmax(1) - F.one_hot(y, 10)) / 32
    torch.testing.assert_close(loss, F.cross_entropy(logits, y))
    assert hits == (logits.argmax(1) == y).sum()
    torch.testing.assert_close(by_bias, grad.sum(0))
    torch.testing.assert_close(by_weight, (rounded(grad).T @ rounded(x)).float())
    assert by_weight.dtype == by_bias.dtype == torch.float32


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("name", "share"), [("mlp:16", 0.03), ("lenet", 0.15)])
def test_networks_in_bfloat16_are_near_those_in_float32_and_not_the_same(name, share, width):
    network = build_network(name, "batch", 0, image_shape=(1, 28, 28), classes=10)
    batch = torch.arange(32)
    rough, exact = (
        run(network, "traced", batch, precision, width)[:-1]
        for precision in ("bfloat16", "float32")
    )
    assert [each.dtype for each in rough] == [torch.float32] * len(rough)
    for a, b in zip(rough, exact, strict=True):
        assert not a.equal(b)
        # A bias before a batch norm has no gradient but roundings, and weights one that is much
        # smaller than the terms of its sum.
        assert (a - b).norm() < share * b.norm() + 1e-3
    assert [each.stride() for each in rough] == [each.stride() for each in exact]


@pytest.mark.parametrize("width", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_compiled_for_a_graph_does_what_the_trace_does(width, monkeypatch):
    monkeypatch.setattr(program, "_compiled", program._compiled_here)
    network = build_network("mlp:16", "torch-batch", 0, image_shape=(1, 28, 28), classes=10)
    found, expected = (moved(network, code, width) for code in ("compiled", "traced"))
    torch.testing.assert_close(found, expected)


def test_a_network_that_is_called_itself_has_float32_alone():
    network = build_network("mlp:8", "plain", 0, image_shape=(1, 28, 28), classes=10)
    with pytest.raises(InputError, match="precision bfloat16 needs a network that does the same"):
        run(network, "eager", torch.arange(32))


def test_an_arm_or_a_recipe_says_the_precision_of_a_fleet():
    splits = split(load("mnist"), 59000)
    traced = Engine("looped", "traced")

    def trained(arm, **fields):
        recipe = Recipe(network="mlp:8", validation=59000, **fields)
        fleet = build_fleet(recipe, [Replica(arm, 0.01, 0)], splits, traced, {})
        assert agrees_with_the_module(fleet)
        fleet.advance(3)
        return fleet.state(0)["output.weight"]

    exact, by_arm, by_recipe = (
        trained("batch"),
        trained("batch+bfloat16"),
        trained("batch", precision="bfloat16"),
    )
    assert by_arm.equal(by_recipe)
    assert not by_arm.equal(exact)
