"""Training on a device that stands in for a GPU (`standin.cpp`).

Run by `test_devices.py`, in a process of its own: such a device is there for good, and torch wants
to know of it before it first goes backward.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import textwrap
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import normlab
from normlab.bench import fleet
from normlab.bench import own as own_fleets
from normlab.bench.work import Work
from normlab.data import load, split
from normlab.errors import InputError
from normlab.layers import Dropout, draw_dropout_from
from normlab.networks import build_network
from normlab.study import run
from normlab.training import (
    Choice,
    Engine,
    Fleet,
    Measurement,
    Outcome,
    Reading,
    Recipe,
    Replica,
    Trainer,
    engine,
    graphs,
    program,
    train,
)

pytestmark = pytest.mark.usefixtures("standin")

# Whose passes have no kernel of normlab's in them on the CPU either, nor another layout.
SAME = [
    ("mlp:8,8", "plain", "sgd"),
    ("mlp:8,8", "torch-batch", "adam"),
    ("mlp:8", "torch-batch+dropout:0.5", "adam"),
    ("mlp:8", "dropout:0.5", "sgd"),
]
CLOSE = [
    ("mlp:8,8", "batch", "sgd"),
    ("mlp:8", "layer", "adam"),
    ("cnn:4,4", "batch", "sgd"),
    ("cnn:4,4", "group:2+dropout:0.5", "sgd"),
    ("lenet", "plain", "sgd"),
]
KINDS = ("looped", "stacked")


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """The library behind devices of the type `standin`, which are there from now on."""
    root = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("standin") / "libstandin.so"
    include = [f"-I{root / 'include' / more}" for more in ("", "torch/csrc/api/include")]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fPIC", "-shared", *include]
    command += [str(Path(__file__).with_name("standin.cpp")), "-o", str(library)]
    subprocess.run([*command, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
    _setup_privateuseone_for_python_backend("standin")
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture
def tapes(standin, monkeypatch):
    """How often each graph was replayed: the device has graphs now."""
    replayed = []

    class Graph:
        def __init__(self, device):
            assert device.type == "standin"

        def warm_up(self, step):
            step()

        def record(self, step):
            self.number = standin.standin_begin()
            try:
                step()
            finally:
                standin.standin_end()
            self.place = len(replayed)
            replayed.append(0)

        def replay(self):
            standin.standin_replay(self.number)
            replayed[self.place] += 1

    monkeypatch.setitem(graphs.GRAPHS, "standin", Graph)
    return replayed


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A few hundred images of a dataset that a network can learn."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "own.npz"
    labels = rng.integers(0, 3, 360)
    noise = rng.integers(0, 128, (360, 16, 16))
    x = (noise + 40 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, x_train=x[:300], y_train=labels[:300], x_test=x[300:], y_test=labels[300:])
    return str(path)


def recipe_of(images, network, optimizer, **fields):
    """Nine steps an epoch, the last one of fewer images."""
    fixed = {"validation": 50, "batch_size": 32, "drop_last": False, "epochs": 2}
    return Recipe(
        dataset=images,
        network=network,
        optimizer=optimizer,
        momentum=0.9 * (optimizer == "sgd"),
        **{**fixed, **fields},
    )


def replicas_of(arm):
    return [
        Replica(arm, lr, seed, decay) for seed in (0, 1) for lr, decay in ((0.03, 0), (0.01, 0.1))
    ]


def events_of(recipe, arm, kind, code="traced", **options):
    """All that is told of some replicas, without the time that it took."""
    chosen = {arm: Choice(arm, Engine(kind, code), {})}
    events = engine.run_replicas(recipe, replicas_of(arm), chosen=chosen, **options)
    return [
        event._replace(seconds=0.0) if isinstance(event, Outcome) else event for event in events
    ]


def values_of(events):
    return torch.tensor(
        [
            value
            for each in events
            if isinstance(each, Measurement)
            for value in each.values.values()
        ]
    )


@pytest.mark.parametrize("code", ["traced", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("network", "arm", "optimizer"), SAME)
def test_the_numbers_are_the_cpus(images, network, arm, optimizer, kind, code):
    probes = ("percentiles", "gradients", "units", "covariate-shift", "smoothness")
    recipe = recipe_of(images, network, optimizer, evaluate_every=5, probes=probes)
    found = events_of(recipe, arm, kind, code, device="standin")
    assert found == events_of(recipe, arm, kind, code)
    assert sum(isinstance(each, Reading) for each in found) == 4 * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("network", "arm", "optimizer"), CLOSE)
def test_with_other_kernels_they_are_as_close_as_roundings(images, network, arm, optimizer, kind):
    recipe = recipe_of(images, network, optimizer, epochs=1)
    found, expected = (events_of(recipe, arm, kind, device=device) for device in ("standin", "cpu"))
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    torch.testing.assert_close(values_of(found), values_of(expected), rtol=0, atol=2e-2)
    losses = [each.values["train", "loss"] for each in found if isinstance(each, Measurement)]
    torch.testing.assert_close(
        losses,
        [each.values["train", "loss"] for each in expected if isinstance(each, Measurement)],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("network", "arm", "optimizer"), [*SAME, *CLOSE, ("cnn:4", "batch+bfloat16", "adam")]
)
@pytest.mark.parametrize(("kind", "graphs"), [("looped", 8), ("stacked", 2)])
def test_steps_replayed_as_graphs_are_the_same_steps(
    images, network, arm, optimizer, kind, graphs, request
):
    recipe = recipe_of(images, network, optimizer)
    plain = events_of(recipe, arm, kind, device="standin")
    tapes = request.getfixturevalue("tapes")
    assert events_of(recipe, arm, kind, device="standin") == plain
    # One of whole batches and one of the rest, each for a replica or for the stack.
    assert sorted(tapes) == [2] * (graphs // 2) + [14] * (graphs // 2)


def test_an_eager_pass_may_be_another_in_every_step_and_is_not_recorded(images, tapes):
    recipe = recipe_of(images, "mlp:8", "sgd", epochs=1)
    events_of(recipe, "plain", "looped", "eager", device="standin")
    assert not tapes


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_begun_again_it_ends_with_the_same_numbers(images, kind, tmp_path):
    recipe, arm = recipe_of(images, "mlp:8", "adam", epochs=3), "torch-batch+dropout:0.5"
    whole = events_of(recipe, arm, kind, device="standin")
    chosen = {arm: Choice(arm, Engine(kind, "traced"), {})}
    options = {"device": "standin", "folder": tmp_path / "checkpoints"}
    with closing(engine.run_replicas(recipe, replicas_of(arm), chosen=chosen, **options)) as events:
        for event in events:
            if isinstance(event, Measurement) and event.epoch == 2:
                break
    assert list((tmp_path / "checkpoints").iterdir())
    assert events_of(recipe, arm, kind, **options) == whole


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's, with networks."""
    text = """
        import torch
        from torch import nn

        class Looks(nn.Module):
            def forward(self, x):  # Off the device and back.
                return x + x.sum().to("cpu").to(x.device)

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = torch.ones(8)

            def forward(self, x):
                return x * self.scale

        def network(between):
            return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), between, nn.Linear(8, 3))

        def looking():
            return network(Looks())

        def left_behind():
            return network(Scaled())
    """
    (tmp_path / "networks_of_a_user.py").write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    yield "networks_of_a_user"
    sys.modules.pop("networks_of_a_user", None)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("network", "code"), [("mlp:8", "traced"), ("networks_of_a_user:looking", "eager")]
)
def test_what_cannot_be_recorded_is_called(images, tapes, network, code):
    recipe = recipe_of(images, network, "sgd", epochs=1)
    replicas = [Replica("plain", 0.01, seed) for seed in range(7)]
    told = "plain: a step cannot be recorded on standin:0 .RuntimeError: the network moves values"
    with pytest.warns(UserWarning, match=told) if code == "eager" else nullcontext():
        (choice, *events) = engine.run_replicas(recipe, replicas, device="standin")
    assert choice.engine.code == code
    assert bool(tapes) == (code == "traced")
    assert sum(isinstance(each, Outcome) for each in events) == 7


def test_what_is_compiled_on_a_device_is_recorded_too(images, tapes, monkeypatch):
    recipe, compiled = recipe_of(images, "mlp:8", "sgd"), []

    def compiled_here(traced, tensors):
        compiled.append(tensors[0].device.type)
        return lambda tensors: traced(*tensors)

    monkeypatch.setattr(program, "_compiled_here", compiled_here)
    plain = events_of(recipe, "plain", "stacked", device="standin")
    tapes.clear()
    assert events_of(recipe, "plain", "stacked", "compiled", device="standin") == plain
    assert (compiled, sorted(tapes)) == (["standin"], [2, 14])


def test_a_stack_holds_more_replicas_than_on_a_cpu(images, tapes):
    recipe = recipe_of(images, "mlp:8", "sgd", epochs=1, drop_last=True)
    replicas = [Replica("plain", 0.01, seed) for seed in range(40)]
    chosen = {"plain": Choice("plain", Engine("stacked", "traced"), {})}
    for _ in engine.run_replicas(recipe, replicas, chosen=chosen, device="standin"):
        pass
    assert len(tapes) == 2  # Twenty each.


def test_a_network_that_stays_behind_in_part_gets_one_line(images, own):
    recipe = recipe_of(images, f"{own}:left_behind", "sgd", epochs=1)
    told = f"{own}:left_behind, arm 'plain': called with images of shape (2, 1, 16, 16) it raised "
    with pytest.raises(InputError, match="same device") as raised:
        list(engine.run_replicas(recipe, [Replica("plain", 0.01, 0)], device="standin"))
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize("kind", ["bytes", "numbers"])
@pytest.mark.parametrize("arm", ["plain", "torch-batch+dropout:0.5"])
def test_a_trainer_trains_where_its_network_is(arm, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (32, 1, 4, 4), generator=generator).to(torch.uint8)
    x = x if kind == "bytes" else x / 255
    y = torch.randint(3, (32,), generator=generator)
    losses = {}
    for device in ("cpu", "standin"):
        network = build_network("mlp:8", arm, 0, image_shape=(1, 4, 4), classes=3).to(device)
        trainer = Trainer(network, lr=0.1, optimizer="sgd")
        batch = x.to(device), y.to(device)
        losses[device] = [trainer.step(*batch) for _ in range(5)], trainer.evaluate(*batch)
    assert losses["standin"][0] == pytest.approx(losses["cpu"][0], rel=1e-5)
    assert losses["standin"][1] == pytest.approx(losses["cpu"][1], rel=1e-5)
    with pytest.raises(
        InputError, match="x is on cpu, y on standin:0 and the network on standin:0"
    ):
        trainer.step(x, y.to("standin"))


def test_one_network_is_trained_in_place_where_it_is(images):
    recipe = recipe_of(images, "mlp:8", "sgd", epochs=1)
    splits = split(load(images), recipe.validation)
    trained = {}
    for device in ("cpu", "standin"):
        network = build_network("mlp:8", "plain", 0, image_shape=(1, 16, 16), classes=3).to(device)
        for _ in train(network, Replica("plain", 0.03, 0), recipe, splits):
            pass
        trained[device] = [each.detach().cpu() for each in network.parameters()]
    assert all(map(torch.equal, trained["standin"], trained["cpu"]))


def test_a_fleet_has_networks_and_images_on_one_device(images):
    recipe = recipe_of(images, "mlp:8", "sgd")
    splits = split(load(images), recipe.validation)
    network = build_network("mlp:8", "plain", 0, image_shape=(1, 16, 16), classes=3).to("standin")
    with pytest.raises(
        InputError, match="the networks are on standin:0 and the images on cpu: exp"
    ):
        Fleet([network], [Replica("plain", 0.03, 0)], recipe, splits, Engine("looped", "traced"))


def test_dropout_draws_where_its_generator_is():
    masks = []
    for device in ("cpu", "standin"):
        layer = Dropout(0.5)
        draw_dropout_from(torch.Generator().manual_seed(0), layer)
        masks.append(layer(torch.ones(100, device=device)))
    assert masks[1].device.type == "standin"
    assert masks[1].cpu().equal(masks[0])


def test_a_worker_has_its_data_on_the_device_and_computes_exactly(images, monkeypatch):
    device, exact = torch.device("standin"), []
    dataset = load(images)
    rest = {**vars(dataset), "labels": dataset.labels.numpy()}
    shared = SimpleNamespace(tensor=rest.pop("images"))
    threads, worker = torch.get_num_threads(), {}
    monkeypatch.setattr(engine, "_worker", worker)
    monkeypatch.setattr(engine, "compute_exactly", exact.append)
    try:
        recipe = recipe_of(images, "mlp:8", "sgd")
        engine._start_worker(recipe, rest, shared, device, None)
        splits = worker["bench"].splits
        held = [splits.dataset.images, splits.dataset.labels, *splits.indices.values()]
        assert {each.device.type for each in held} == {"standin"}
        assert exact == [device]
    finally:
        torch.set_num_threads(threads)


def test_what_was_found_fastest_is_remembered_for_the_device_alone(images):
    recipe = recipe_of(images, "mlp:8", "sgd", epochs=1)
    replicas = [Replica("plain", 0.01, seed) for seed in range(2)]
    for device, times in [("cpu", {"native", "traced"}), ("standin", {"traced"})]:
        (choice, *_) = engine.run_replicas(recipe, replicas, device=device)
        assert {timed.partition(", ")[2] for timed in choice.seconds} == times


def test_a_ledger_knows_the_device_and_goes_on_with_no_other(images, tapes, tmp_path):
    fields = {"dataset": images, "validation": 50, "network": "mlp:8", "epochs": 2}
    fields |= {"arms": ["plain", "batch"], "seeds": 2, "progress": False, "engine": "stacked"}
    comparison = normlab.compare(**fields, device="standin", out=tmp_path / "run")
    assert len(comparison.replicas()) == 4
    assert tapes
    (session,) = comparison.sessions
    assert json.loads(session["machine"])["device"] == "standin"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "trained on standin" in page
    assert set(comparison.replicas()["engine"]) == {"stacked, traced"}

    class StopError(Exception):
        """Raised by a watcher."""

    class Watcher:
        def begin(self, *_):
            """Nothing is shown."""

        def __call__(self, event):
            if isinstance(event, Measurement):
                raise StopError

    declared, out = comparison.study, tmp_path / "stopped"
    with pytest.raises(StopError):
        run(declared, out, device="standin", engine="stacked", watcher=Watcher())
    with pytest.raises(InputError, match="was begun with device standin, and this is cpu, whose"):
        run(declared, out)
    run(declared, out, device="standin")
    pd.testing.assert_frame_equal(normlab.Comparison(out).curves(), comparison.curves())


def test_the_benchmarks_peers_and_normlabs_own_train_there(tapes, monkeypatch):
    pytest.importorskip("PIL")
    work = Work("tiny", "mlp:16", 32, "adam", 0.01, images=320, loader_workers=0, device="standin")
    row = fleet._measure(work, 0.0, {}, compiled=False)
    assert row.skipped["jax"] == "it is measured on a CPU alone"
    assert {"tutorial", "eager", "products", "products of 10"} == set(row.timings)
    assert all(last < 0.8 * first for first, last in row.losses.values())

    monkeypatch.setattr(own_fleets, "_here", {})
    exact = []
    monkeypatch.setattr(own_fleets, "compute_exactly", exact.append)
    threads = torch.get_num_threads()
    try:
        own_fleets._start(work, 40, 0, 1)
        assert [len(each.replicas) for each in own_fleets._here["fleets"]] == [20, 20]
        first = own_fleets._advance(20)
        for _ in range(3):
            last = own_fleets._advance(20)
        assert last < 0.8 * first
        assert own_fleets._evaluate() < 40 * math.log(10)
        assert sorted(tapes)[-2:] == [80, 80]
        assert exact == [torch.device("standin")]
    finally:
        torch.set_num_threads(threads)
