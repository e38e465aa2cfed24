import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab
from normlab.probes import Flow, flow


def follow(network, x):
    found, places = Flow(), []
    with flow(network, found, lambda place, kind, _: places.append((place, kind))) as end:
        end(network(x))
    return found, places


class Net(nn.Module):
    """A residual network with a reused activation and functions in the place of modules."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.first, self.second, self.last = norm(4), norm(4), norm(4)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)

    def forward(self, x):
        y = self.act(self.first(self.a(x)))
        y = self.second(self.drop(self.b(y)))
        y += x
        y = self.act(y)
        y = torch.tanh(F.relu(y))
        return F.log_softmax(self.last(torch.sigmoid(y)).flatten(1), 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, normlab.BatchNorm1d])
def test_what_stands_around_norms(norm):
    found, places = follow(Net(norm), torch.randn(5, 4))
    assert found.biases == {"first": "a"}
    assert found.added == {"second"}
    assert found.dropouts == {"second": ["drop"], "last": ["drop"]}
    assert found.last == {"last"}
    assert places == [
        *(("act", "relu"), ("act (call 2)", "relu")),
        *(("", "relu"), (" (call 2)", "tanh"), (" (call 3)", "sigmoid")),
    ]


def test_weights_after_a_norm_end_what_it_is_the_last_of():
    found, _ = follow(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), torch.randn(5, 4))
    assert found.last == set()
    weight = nn.Parameter(torch.ones(4))

    class Scaled(nn.BatchNorm1d):
        pass

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.weight = Scaled(4), weight

        def forward(self, x):
            return self.norm(x) * self.weight

    assert follow(Functional(), torch.randn(5, 4))[0].last == set()


def test_a_bias_counts_only_straight_before_a_norm():
    straight = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity(), nn.BatchNorm2d(2))

    class Contiguous(nn.Module):
        def forward(self, x):
            return x.contiguous().to(x.dtype)

    same = nn.Sequential(nn.Conv2d(1, 2, 3), Contiguous(), nn.BatchNorm2d(2))
    in_place = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2))
    between = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
    without = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    x = torch.randn(2, 1, 5, 5)
    for network in (straight, same):
        assert follow(network, x)[0].biases == {"2": "0"}
    for network in (between, in_place, without):
        assert follow(network, x)[0].biases == {}


def test_a_layer_that_activates_itself_is_one_place():
    layer = normlab.BatchNorm2d(2, activation="relu")
    found, places = follow(nn.Sequential(layer), torch.randn(2, 2, 3, 3))
    assert places == [("0", "relu")]
    x = torch.randn(2, 2, 3, 3)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normlab.BatchNorm2d(2, activation="relu")

        def forward(self, x):
            return self.norm(x, x)

    assert follow(Residual(), x)[0].added == {"norm"}
    assert found.added == set()


def test_the_output_of_the_network_is_a_gate():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1), nn.Sigmoid())
    assert follow(network, torch.randn(5, 4))[0].gates == {"3"}


def test_no_activation_lives_longer_than_without_it():
    network, kept = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), []
    network[0].register_forward_hook(lambda *each: kept.append(weakref.ref(each[2])))
    with torch.no_grad(), flow(network, Flow(), lambda *_: None) as end:
        output = network(torch.randn(5, 4))
        end(output)
        gc.collect()
        assert kept[0]() is None


def test_hooks_are_gone_whatever_happens():
    network = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(RuntimeError), flow(network, Flow(), lambda *_: None):
        network(torch.randn(5, 3))
    assert not network[0]._forward_hooks
    assert not network[0]._forward_pre_hooks
    network(torch.randn(5, 4))
