import copy
import random

import pytest
import torch

from normlab.data import Dataset, Splits, load, scale
from normlab.networks import build_network
from normlab.probes import PROBES, read
from normlab.training import (
    Engine,
    Fleet,
    Measurement,
    Outcome,
    Reading,
    Recipe,
    Replica,
    checkpoint,
    train,
)
from normlab.training.choice import _digest

ENGINES = [
    Engine("looped", "eager"),
    Engine("looped", "traced"),
    Engine("stacked", "traced"),
    Engine("looped", "native"),
]
ARM = "batch+dropout:0.5"
ALL = tuple(PROBES)
PASSES = {}
"""Traced once for all tests: they depend on nothing that a recipe here changes."""


@pytest.fixture(scope="module")
def splits():
    """300 images to train on and 40 to evaluate on."""
    images, labels = load("mnist").images[-340:].clone(), load("mnist").labels[-340:].clone()
    indices = {"train": torch.arange(300), "test": torch.arange(300, 340)}
    return Splits(Dataset("few", images, labels, train_size=300, classes=10), indices)


def fleet(splits, engine, arm=ARM, lrs=(0.01, 0.01), **fields):
    recipe = Recipe(epochs=2, batch_size=40, drop_last=False, **fields)
    replicas = [Replica(arm, lr, seed) for seed, lr in enumerate(lrs)]
    networks = [
        build_network("mlp:8", arm, seed, image_shape=(1, 28, 28), classes=10)
        for seed in range(len(lrs))
    ]
    return Fleet(networks, replicas, recipe, splits, engine, PASSES)


def told(events, *kinds):
    """Events of some kinds, without the time that they took."""
    chosen = [event for event in events if isinstance(event, kinds)]
    return [e._replace(seconds=0) if isinstance(e, Outcome) else e for e in chosen]


def same_bits(one, other):
    return all(
        state.equal(other.state(r)[name]) for r in range(2) for name, state in one.state(r).items()
    )


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("every", [0, 3])
def test_probing_does_not_change_a_bit_of_training(splits, engine, every):
    probed = fleet(splits, engine, probes=ALL, probe_every=every)
    generators = torch.get_rng_state(), random.getstate()
    events = list(probed.train())
    assert torch.get_rng_state().equal(generators[0])
    assert random.getstate() == generators[1]
    alone = fleet(splits, engine)
    assert told(alone.train(), Measurement, Outcome) == told(events, Measurement, Outcome)
    assert same_bits(alone, probed)
    steps = [event.step for event in told(events, Reading) if event.replica.seed == 1]
    assert steps == ([0, 3, 6, 9, 12, 15] if every else [0, 8, 16])


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_what_is_read_is_the_network_of_the_moment_on_some_training_images(splits, engine):
    probed = fleet(splits, engine, probes=["units", "gradients", "covariate-shift"], probe_every=5)
    indices = splits.indices["train"][:256]
    x = scale(splits.dataset.images[indices], "0..1")
    y = splits.dataset.labels[indices]
    network = build_network("mlp:8", ARM, 5, image_shape=(1, 28, 28), classes=10)
    replicas, seen = list(probed.replicas), 0
    first = [copy.deepcopy(probed.state(r)) for r in range(2)]
    for event in probed.train():
        if not isinstance(event, Reading):
            continue
        seen += 1
        r = replicas.index(event.replica)
        state = probed.state(r) if event.step else first[r]
        expected = read(probed.recipe.probes, network, state, x, y, event.replica.lr)
        assert event.epoch == event.step // 8
        assert list(event.values) == list(probed.recipe.probes)
        for probe, layers in event.values.items():
            for layer, values in layers.items():
                assert values == pytest.approx(expected[probe][layer], rel=1e-5, abs=1e-7)
    assert seen == 2 * 4


@pytest.mark.parametrize("engine", ENGINES[1:], ids=str)
def test_a_killed_fleet_goes_on_to_the_same_bits_and_readings(splits, tmp_path, engine):
    def make():
        return fleet(splits, engine, probes=ALL, probe_every=3)

    whole = make()
    expected = told(whole.train(), Measurement, Reading, Outcome)
    path = tmp_path / "fleet.safetensors"
    events = make().train(path)
    while not path.exists():
        next(events)
    for _ in range(3):  # What comes after the checkpoint is lost.
        next(events)
    events.close()
    again = make()
    assert told(again.train(path), Measurement, Reading, Outcome) == expected
    assert same_bits(again, whole)
    assert told(expected, Reading)


def test_a_checkpoint_gives_back_what_was_read(tmp_path):
    reading = Reading(Replica("batch", 0.1, 3), 7, 1, {"smoothness": {"": {"loss.range": 0.1}}})
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {}, {"engine": "one"}, [reading])
    _, events = checkpoint.load(path, {}, engine="one")
    assert events == [reading]
    assert isinstance(events[0], Reading)
    assert isinstance(events[0].replica, Replica)


@pytest.mark.parametrize("engine", ENGINES[1:], ids=str)
def test_a_replica_that_diverged_is_read_no_more(splits, engine):
    probed = fleet(splits, engine, "plain", (0.01, 1e30), probes=ALL, optimizer="sgd")
    events = list(probed.train())
    (outcome,) = [e for e in told(events, Outcome) if e.status == "diverged"]
    read_at = {
        r: [e.step for e in told(events, Reading) if e.replica.lr == r] for r in (0.01, 1e30)
    }
    assert outcome.step == 8
    assert read_at == {0.01: [0, 8, 16], 1e30: [0]}


def test_probes_have_no_say_in_which_engine_an_arm_gets(splits):
    probed = Recipe(probes="units", probe_every=3)
    assert _digest(probed, splits, ARM, "auto", 2) == _digest(Recipe(), splits, ARM, "auto", 2)
    assert _digest(probed, splits, ARM, "auto", 3) != _digest(Recipe(), splits, ARM, "auto", 2)


def test_training_one_network_tells_what_probes_read(splits):
    network = build_network("mlp:8", "batch", 0, image_shape=(1, 28, 28), classes=10)
    recipe = Recipe(epochs=1, batch_size=50, probes="units", probe_every=4)
    events = list(train(network, Replica("batch", 0.01, 0), recipe, splits))
    assert [type(event) for event in events] == [Reading, Reading, Measurement, Outcome]
    assert [event.step for event in events[:2]] == [0, 4]
