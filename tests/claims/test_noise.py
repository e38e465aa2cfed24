import pytest
import torch
from torch import nn

from normlab.claims import noise
from normlab.claims.setups import deep_linear
from normlab.data import load, split
from normlab.layers import BatchNorm1d, draw_dropout_from
from normlab.streams import stream
from normlab.training import Engine, Fleet, Recipe, Replica
from normlab.training.networks import build, build_checked

STEADY, NOISY = "normlab.claims.noise:steady_perceptron", "normlab.claims.noise:noisy_perceptron"


def recipe(network):
    return Recipe(network=network, optimizer="sgd", batch_size=64, validation=59_000)


@pytest.fixture(scope="module")
def splits():
    return split(load("mnist"), 59_000)


@pytest.mark.parametrize(
    ("layer", "center", "width"), [(noise.Offset, 0.0, 0.5), (noise.Factor, 1.0, 0.25)]
)
def test_channels_have_a_centre_at_each_step_and_jitter_at_each_sample(layer, center, width):
    module, like = layer(), torch.zeros(20_000, 64)
    draw_dropout_from(stream(0, "dropout"), module)
    first, second = module.draw(like).double(), module.draw(like).double()
    for drawn in (first, second):
        means = drawn.mean(0)
        assert (means - center).abs().max() < width + 0.005
        # A uniform distribution's deviation is its half width over √3; 64 draws tell it to a fifth.
        assert means.std() == pytest.approx(width / 3**0.5, rel=0.2)
        assert drawn.std(0) == pytest.approx(torch.full((64,), 0.1).double(), rel=0.03)
    assert torch.corrcoef(torch.stack([first.mean(0), second.mean(0)]))[0, 1].abs() < 0.4


@pytest.mark.parametrize("layer", [noise.Offset, noise.Factor])
def test_there_is_no_noise_in_eval_mode_nor_where_dropout_is_off(layer):
    module, x = layer(), torch.randn(4, 3, generator=stream(0, "x"))
    module.generator = torch.Generator()
    assert not module(x).equal(x)
    assert module.eval()(x).equal(x)
    module.train().p = 0.0
    assert module(x).equal(x)


def test_an_offset_is_added_and_a_factor_multiplies():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for layer, expected in ((noise.Offset, [[6.0, 1.0], [5.0, 5.0]]), (noise.Factor, None)):
        module = layer()
        module.mask = torch.tensor([[5.0, -1.0], [2.0, 1.0]])
        expected = expected or [[5.0, -2.0], [6.0, 4.0]]
        assert module(x).tolist() == expected


@pytest.mark.parametrize("arm", ["plain", "batch"])
def test_noise_changes_nothing_of_the_first_weights(arm, splits):
    networks = [build(recipe(name), arm, 7, splits.dataset) for name in (STEADY, NOISY)]
    steady, noisy = (network.state_dict() for network in networks)
    assert list(steady) == list(noisy)
    assert all(steady[name].equal(noisy[name]) for name in steady)
    assert sum(isinstance(m, BatchNorm1d) for m in networks[1].modules()) == 4 * (arm == "batch")


@pytest.mark.parametrize("code", ["native", "traced"])
def test_a_study_can_train_it_and_the_seed_decides_the_noise(splits, code):
    build_checked(recipe(NOISY), "batch", splits.dataset)

    def weights(network, seed, code):
        replica = Replica("batch", 0.1, seed)
        built = [build(recipe(network), "batch", 0, splits.dataset)]
        fleet = Fleet(built, [replica], recipe(network), splits, Engine("looped", code))
        fleet.advance(10)
        return torch.cat([each.flatten() for each in fleet.state(0).values()])

    # The order of the data is another with another seed, too; the noise shows against `STEADY`.
    found = weights(NOISY, 1, code)
    assert found.equal(weights(NOISY, 1, code))
    assert (found - weights(NOISY, 1, "eager")).norm() < 1e-5 * found.norm()
    assert (found - weights(NOISY, 2, code)).norm() > 1e-2 * found.norm()
    assert (found - weights(STEADY, 1, code)).norm() > 1e-2 * found.norm()


def test_the_linear_network_is_linear_in_eval_mode_and_keeps_lengths():
    network = deep_linear().double().eval()
    x = torch.rand(3, 1, 28, 28, generator=stream(0, "x")).double()
    one, other, both = network(x[:1]), network(x[1:2]), network(x[:1] + x[1:2])
    assert (one + other).allclose(both, rtol=1e-10)
    assert sum(isinstance(each, nn.BatchNorm1d) for each in network) == 25
    # Of orthogonal layers of one width each keeps the length of what it gets, but for ε.
    hidden = network[1:3](x.flatten(1))
    deep = network[3:-1](hidden)
    assert deep.norm(dim=1).allclose(hidden.norm(dim=1), rtol=1e-3)
