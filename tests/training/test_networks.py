import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from normlab.data import load
from normlab.errors import InputError
from normlab.layers import Dropout
from normlab.training import Recipe, build
from normlab.training.networks import build_checked, check_alike, digest

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn


def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 10),
    )


def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9))


def square():
    return nn.Conv2d(1, 10, 3)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        return F.dropout(self.linear(x.flatten(1)), 0.5, self.training)


class Pair(Random):
    def forward(self, x):
        return self.linear(x.flatten(1)), 1


class Assigns(Random):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return self.linear(x.flatten(1)) - self.mean * (not self.training)


class Keeps(Random):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, x):
        if self.training:
            self.mean = x.mean()
        return self.linear(x.flatten(1)) - self.mean * (not self.training)


class Draws(Random):
    def __init__(self):
        super().__init__()
        self.factor = float(torch.rand(()))

    def forward(self, x):
        return self.linear(x.flatten(1)) * self.factor


def others():
    import random

    import numpy as np

    network = bare()
    with torch.no_grad():
        network[1].bias.fill_(random.random() + np.random.rand())
    return network


def frozen():
    return bare().requires_grad_(False)


def wide():
    return nn.Linear(3, 10)


def text():
    return "a network"
"""


QUICK = {"dataset": "./some.npz", "validation": 100, "epochs": 1, "batch_size": 100}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    mnist = load("mnist")
    np.savez("some.npz", images=mnist.images[:900, 0].numpy(), labels=mnist.labels[:900].numpy())
    yield
    sys.modules.pop("own_networks", None)


def make(name, arm="batch", seed=0):
    return build(Recipe(network=f"own_networks:{name}"), arm, seed, load("mnist"))


def test_arms_are_made_by_exchanging_norms_and_share_their_first_values():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain, batch, group = (make("small", arm) for arm in ("plain", "batch", "group:2"))
    assert torch.get_rng_state().equal(before)
    assert isinstance(plain[1], nn.Identity)
    assert isinstance(batch[1], normlab.BatchNorm2d)
    assert isinstance(group[5], nn.GroupNorm)
    for i in (0, 4, 8):
        assert plain[i].weight.equal(batch[i].weight)
        assert plain[i].weight.equal(group[i].weight)
    assert not make("small", "plain", seed=1)[0].weight.equal(plain[0].weight)
    assert type(batch[7]) is Dropout
    assert batch[7].p == 0.25
    assert make("small", "batch+dropout:0.5")[7].p == 0.5
    assert all(each.training for each in batch.modules())
    assert batch[1].num_batches_tracked == 0  # As it was made.


def test_a_network_without_norms_can_be_plain():
    assert isinstance(make("bare", "plain"), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "arm", "message"),
    [
        ("bare", "group:8", "arm 'group:8': the network has no norm layer that group:8 could"),
        ("bare", "dropout:0.5", "it has no torch.nn.Dropout whose probability could be set"),
        ("small", "batch@post", "has its norms where it has them: leave out @"),
        ("narrow", "plain", r"an output of shape \(2, 9\): expected \(2, 10\)"),
        ("square", "plain", r"an output of shape \(2, 10, 26, 26\)"),
        ("wide", "plain", r"called with images of shape \(2, 1, 28, 28\) it raised RuntimeError"),
        ("Random", "plain", "called twice it returned different outputs"),
        ("Pair", "plain", "it returned a tuple: expected a tensor of logits"),
        ("Assigns", "plain", "it assigns a new tensor to its buffer 'mean'"),
        ("Keeps", "plain", "it keeps something from call to call that is neither"),
        ("frozen", "plain", "it has no parameter that requires a gradient"),
        ("text", "plain", "expected a torch.nn.Module, got str"),
    ],
)
def test_what_cannot_be_trained_is_one_line(name, arm, message):
    with pytest.raises(InputError, match=message):
        build_checked(Recipe(network=f"own_networks:{name}"), arm, load("mnist"))


def test_every_global_generator_belongs_to_the_seed_and_is_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = (
        make("others", "plain"),
        make("others", "plain"),
        make("others", "plain", 1),
    )
    assert first[1].bias.equal(again[1].bias)
    assert not first[1].bias.equal(other[1].bias)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_networks_that_differ_in_what_a_fleet_cannot_hold_are_refused():
    recipe = Recipe(network="own_networks:Draws")
    networks = [make("Draws", "plain", seed) for seed in range(2)]
    with pytest.raises(InputError, match="its networks differ from seed to seed in something"):
        check_alike(recipe, networks, load("mnist"))
    check_alike(recipe, networks[:1] * 2, load("mnist"))
    assert all(each.training for each in networks)


def test_options_of_normlabs_own_networks_are_refused():
    with pytest.raises(ValueError, match="activation='tanh' belongs to normlab's own networks"):
        Recipe(network="own_networks:small", activation="tanh")
    with pytest.raises(ValueError, match="init='xavier' belongs"):
        Recipe(network="own_networks:small", init="xavier")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_study_of_ones_own_network_is_run_and_shown(tmp_path, workers):
    arms = ["plain", "batch", "batch+dropout:0.5"]
    study = normlab.Study(network="own_networks:small", arms=arms, seeds=2, **QUICK)
    comparison = normlab.compare(
        study, out=tmp_path / "run", workers=workers, engine="looped", progress=False
    )
    frame = comparison.frame()
    assert set(frame["arm"]) == {"plain", "batch", "batch+dropout:0.5"}
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "own_networks:small" in text


def test_a_digest_is_of_layers_and_values_of_any_type():
    first = digest(make("small"))
    assert digest(make("small")) == first
    assert digest(make("small", seed=1)) != first
    assert digest(make("small", "group:2")) != first
    half = make("small").bfloat16()
    assert digest(half) == digest(half) != first


def test_a_study_of_another_network_is_refused_whichever_arm_shows_it(tmp_path):
    study = normlab.Study(network="own_networks:small", arms=["plain", "batch"], seeds=1, **QUICK)
    normlab.compare(study, out=tmp_path / "run", progress=False)
    module = tmp_path / "own_networks.py"
    module.write_text(MODULE.replace("nn.BatchNorm1d(16)", "nn.BatchNorm1d(16, eps=10.0)"))
    sys.modules.pop("own_networks")
    with pytest.raises(InputError, match="was begun with another network: the SHA-256 of own_net"):
        normlab.compare(study, out=tmp_path / "run", progress=False)
