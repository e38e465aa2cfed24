import pytest
import torch
from torch import nn

from normlab.probes import outputs


@pytest.fixture
def network():
    shared = nn.ReLU()
    return nn.Sequential(nn.Linear(3, 4), shared, nn.Sequential(nn.Linear(4, 2), shared))


def test_every_call_of_a_layer_is_shown_and_nothing_that_holds_layers(network):
    seen = []
    with outputs(network, lambda name, layer, output: seen.append((name, layer, output))):
        y = network(torch.randn(5, 3))
    assert [name for name, _, _ in seen] == ["0", "1", "2.0", "1"]
    assert all(layer is network.get_submodule(name) for name, layer, _ in seen)
    assert seen[-1][2] is y


def test_outputs_that_are_no_tensors_are_shown_as_they_are():
    seen = []
    with outputs(nn.LSTM(3, 2), lambda *each: seen.append(each[2])) as _:
        pass
    network = nn.Sequential(nn.LSTM(3, 2))
    with outputs(network, lambda *each: seen.append(each[2])):
        found = network(torch.randn(4, 3))
    assert seen == [found]


def test_hooks_are_gone_whatever_happens(network):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), outputs(network, fail):
        network(torch.randn(5, 3))
    assert not any(module._forward_hooks for module in network.modules())
    network(torch.randn(5, 3))
