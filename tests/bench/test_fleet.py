import json
import math
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice

import pytest
import torch
from torch import nn

from normlab.bench import fleet, own, peers
from normlab.bench.timing import Timing
from normlab.bench.work import WORKS, Work, layers_of
from normlab.data import scale

TINY = Work("tiny", "mlp:16", 32, "adam", 0.01, images=320)
CONVOLVED = Work("tiny lenet", "lenet", 32, "sgd", 0.9, activation="sigmoid", images=320)

needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="needs the extra `bench`")


@pytest.fixture(scope="module")
def benchmark():
    if find_spec("PIL") is None:
        pytest.skip("needs the extra `bench`")
    return fleet.bench_fleet(
        seconds=0.0, works=[TINY], fleets={"eager again": peers.eager}, compiled=False
    )


@pytest.mark.slow
def test_every_peer_is_measured_and_every_peer_that_trains_learns(benchmark):
    (row,) = benchmark.rows
    trained = ["tutorial", "eager", *["jax"] * ("jax" not in row.skipped), "eager again"]
    assert list(row.timings) == [*trained[:-1], "products", "products of 10", "eager again"]
    assert all(0 < t.low <= t.median <= t.high for t in row.timings.values())
    assert list(row.losses) == list(row.evaluations) == trained
    for first, last in row.losses.values():
        assert last < 0.8 * first
    assert all(0 < t.low <= t.median <= t.high for t in row.evaluations.values())
    # A fleet handed in is called as a peer is: the same training, so the same losses.
    assert row.losses["eager again"] == row.losses["eager"]
    assert 0 < row.startup < row.timings["tutorial"].low


def test_our_fleets_train_as_the_peers_do(monkeypatch):
    monkeypatch.setattr(own, "_here", {})
    monkeypatch.setattr(own, "compute_exactly", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    own._start(TINY, 3, 0, 2)
    assert [replica.seed for replica in own._here["fleets"][0].replicas] == [0, 2]
    peer, others = peers.eager(TINY), own._here["fleets"][0].losses
    for _ in range(2):
        before = others[1].item()
        total = own._advance(peer.steps)
        other = (others[1].item() - before) / peer.steps
        assert total - other == pytest.approx(peer.train(), rel=1e-5)
    own._start(TINY, 1, 0, 1)
    own._advance(2 * peer.steps)
    # Adam moves biases before a batch norm by rounding errors alone; running means follow late.
    assert own._evaluate() == pytest.approx(peer.evaluate(), rel=2e-3)


def row_of(work=TINY, skipped=None, evaluations=None, **medians):
    timings, evaluated = (
        {name: Timing(median, median, median, 7) for name, median in each.items()}
        for each in (medians, evaluations or {})
    )
    return fleet.Row(work, timings, evaluated, {}, 0.0, skipped or {})


def test_ratios_are_of_the_peer_to_others_and_the_ceiling_is_the_faster_of_two():
    medians = {"tutorial": 30.0, "eager": 8.0, "jax": 3.0, "products": 0.5, "ours": 2.0}
    row = row_of(evaluations={"tutorial": 6.0, "ours": 1.0}, **medians, **{"products of 10": 1.0})
    assert row.against("ours") == {
        "against tutorial": 15.0,
        "against eager": 4.0,
        "against jax": 1.5,
        "share of the ceiling": 0.25,
        "with evaluation": 12.0,
    }
    without = row_of(eager=8.0, products=0.5, ours=2.0).against("ours")
    assert math.isnan(without["against tutorial"])
    assert math.isnan(without["with evaluation"])
    assert math.isnan(without["against jax"])


def test_a_call_is_scaled_to_an_epoch_and_the_start_is_added_once():
    # 1875 steps an epoch, at 50 replica steps a call.
    timing = fleet._scaled(Timing(0.2, 0.1, 0.4, 9), 1875 / 50, 3.0)
    assert timing == Timing(3.0 + 7.5, 3.0 + 3.75, 3.0 + 15.0, 9)


def test_a_peer_whose_package_is_missing_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(fleet, "find_spec", lambda module: None if module == "jax" else module)
    reason = "jax is not installed: pip install 'normlab[bench]'"
    assert fleet._missing() == {"jax": reason}
    row = row_of(skipped=fleet._missing(), eager=1.0, products=0.5)
    text = str(fleet.FleetBenchmark([row], {}, ""))
    assert f"Without jax: {reason}" in text
    assert "against jax" not in text


@pytest.mark.slow
def test_json_and_text_hold_versions_machine_ratios_and_every_peer(benchmark):
    document = json.loads(json.dumps(benchmark.to_json()))
    assert {"normlab", "torch", "python", "pillow"} <= document["versions"].keys()
    assert document["machine"] == benchmark.machine
    (row,) = document["rows"]
    assert row["work"]["images"] == 320
    assert row["ratios"]["eager"]["against eager"] == 1.0
    text = str(benchmark)
    assert all(peer in text for peer in row["timings"])
    frame = benchmark.frame()
    assert list(frame["peer"]) == list(row["timings"])
    assert list(frame["against eager"]) == [
        ratios["against eager"] for ratios in row["ratios"].values()
    ]


def test_random_bytes_are_said_to_be_random():
    row = row_of(WORKS[2], eager=1.0, products=0.5)
    text = str(fleet.FleetBenchmark([row], {}, ""))
    assert "50,000 images of random bytes, 3×32×32" in text


def test_the_works_are_the_four_of_the_studies():
    assert [work.steps_per_epoch for work in WORKS] == [1875, 937, 1562, 234]
    widths = [
        [layer.out_features for layer in work.build(0).modules() if isinstance(layer, nn.Linear)]
        for work in WORKS
    ]
    assert widths == [[32, 32, 10], [512, 512, 10], [128, 10], [120, 84, 10]]
    stock = {type(layer) for work in WORKS for _, layer in layers_of(work.build(0))}
    assert {nn.BatchNorm1d, nn.BatchNorm2d} <= stock


def test_the_tutorials_images_are_the_scaled_bytes():
    pytest.importorskip("PIL")
    for work in (
        TINY,
        Work(
            "", "mlp:8", 8, "sgd", 0.1, "relu", "batch", "torch", "random", (3, 32, 32), 16, "-1..1"
        ),
    ):
        images, labels = work.load()
        for index in (0, 7):
            image, label = peers._Images(work)[index]
            expected = scale(images[index], work.scaling)
            torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)
            assert label == int(labels[index])


def test_an_epoch_has_every_image_at_most_once():
    work = Work("", "mlp:8", 32, "sgd", 0.1, images=100)
    batches = work.batches(0)
    first, second = (torch.cat(list(islice(batches, 3))) for _ in range(2))
    assert len(first.unique()) == len(second.unique()) == 96
    assert not first.equal(second)


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_products_alone_are_those_of_forward_and_backward(replicas):
    from torch.utils.flop_counter import FlopCounterMode

    for work in (TINY, CONVOLVED):
        with FlopCounterMode(display=False) as training:
            peer = peers.eager(work)
            peer.train()
        with FlopCounterMode(display=False) as alone:
            bare = peers.products(work, replicas=replicas)
            built = alone.get_total_flops()
            bare.train()
        ours, theirs = alone.get_total_flops() - built, training.get_total_flops()
        assert ours / bare.steps == theirs / peer.steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_the_compiled_peer_trains_as_the_eager_one_does():
    eager, compiled = peers.eager(TINY), peers.compiled_eager(TINY)
    for _ in range(3):
        assert math.isclose(compiled.train(), eager.train(), rel_tol=1e-3)


# In a process of its own, because JAX warns of every fork that its process makes later on. In
# float64, because a bias before a batch norm has rounding errors alone for its gradient, and Adam
# takes steps of full length for them unless they are far below its eps.
JAX_STEPS = """
import jax, numpy as np, torch
import torch.nn.functional as F
from normlab.bench import jax_peer, peers
from normlab.bench.work import Work
from normlab.data import SCALINGS

jax.config.update("jax_enable_x64", True)
work, replicas, steps = Work(**{fields!r}), {replicas}, 12
images, labels = work.load()
orders = [work.batches(seed) for seed in range(replicas)]
batches = np.stack([[next(order).numpy() for order in orders] for _ in range(steps)])
train = jax_peer.jax_trainer(work)
state = jax.tree.map(
    lambda each: each.astype(float) if each.dtype == np.float32 else each,
    jax_peer.jax_state(work, replicas),
)
state, losses = train(state, images.numpy(), labels.numpy(), batches[: steps - 1])
state, last = train(state, images.numpy(), labels.numpy(), batches[steps - 1 :])  # Without scan.
losses = np.concatenate([losses, last])
evaluated = jax_peer.jax_evaluator(work)(state, images.numpy(), labels.numpy())
factor, offset = SCALINGS[work.scaling]
for seed in range(replicas):
    network = work.build(seed).double()
    optimizer = peers.optimizer_of(work)(network.parameters(), lr=work.lr)
    for batch, theirs in zip(torch.from_numpy(batches[:, seed]), losses[:, seed]):
        x = images[batch].double() * factor + offset
        loss = F.cross_entropy(network(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(theirs, loss.item(), rtol=1e-8)
    for name, value in network.state_dict().items():
        kind = "parameters" if name in state["parameters"] else "buffers"
        ours = np.asarray(state[kind][name][seed])
        np.testing.assert_allclose(ours, value, rtol=1e-8, atol=1e-8, err_msg=name)
    network.eval()
    with torch.no_grad():
        logits = network(images.double() * factor + offset)
    loss, accuracy = (float(each[seed]) for each in evaluated)
    np.testing.assert_allclose(loss, F.cross_entropy(logits, labels).item(), rtol=1e-8)
    np.testing.assert_allclose(accuracy, (logits.argmax(1) == labels).double().mean().item())
print("equal")
"""


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "replicas"),
    [
        (TINY, 3),
        (Work("", "mlp:16,16", 32, "sgd", 0.1, images=320, scaling="-1..1"), 2),
        (CONVOLVED, 1),
    ],
    ids=["mlp, Adam", "mlp, SGD", "lenet"],
)
def test_jax_trains_every_replica_as_torch_does(work, replicas):
    fields = {name: getattr(work, name) for name in work.__dataclass_fields__}
    script = JAX_STEPS.format(fields=fields, replicas=replicas)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
