import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab
from normlab.networks import ACTIVATIONS
from normlab.probes.activations import activations


def watch(network, x):
    seen = []
    with activations(network, lambda *one: seen.append(one)):
        network(x)
    return seen


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_activation_of_a_study_is_seen_with_what_it_gets_and_returns(name, inplace):
    activation = ACTIVATIONS[name]()
    if inplace and not hasattr(activation, "inplace"):
        pytest.skip("it has no in-place form")
    if inplace:
        activation.inplace = True
    x = torch.linspace(-2, 2, 10).view(5, 2)
    ((place, kind, input, output),) = watch(nn.Sequential(nn.Identity(), activation), x.clone())
    assert (place, kind) == ("1", name)
    assert input.equal(x)
    assert output.equal(ACTIVATIONS[name]()(x))


def test_functions_and_second_calls_have_their_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            y = self.act(self.act(x) - 1)
            return torch.sigmoid(F.relu6(input=y)).tanh_()

    places = [one[:2] for one in watch(Net(), torch.randn(5, 2))]
    assert places == [
        *(("act", "relu"), ("act (call 2)", "relu")),
        *(("", "relu6"), (" (call 2)", "sigmoid"), (" (call 3)", "tanh")),
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 3}], ids=str)
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "silu"])
def test_what_an_activation_inside_a_batch_norm_gets_is_normalized_plus_residual(
    name, options, training
):
    x, residual = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    bare = normlab.BatchNorm1d(4, **options).double().train(training)
    fused = normlab.BatchNorm1d(4, activation=name, **options).double().train(training)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fused

        def forward(self, x):
            return self.norm(x, residual=residual)

    ((place, kind, input, output),) = watch(Net(), x)
    assert (place, kind) == ("norm", name)
    expected = bare(x) + residual
    torch.testing.assert_close(input, expected)
    torch.testing.assert_close(output, ACTIVATIONS[name]()(expected))
    assert fused.activation == name


def test_hooks_are_gone_when_the_network_fails():
    class Fails(nn.Module):
        def forward(self, _):
            raise ArithmeticError

    network = nn.Sequential(nn.ReLU(), Fails())
    with pytest.raises(ArithmeticError):
        watch(network, torch.ones(2, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert watch(nn.ReLU(), torch.ones(2, 2))
