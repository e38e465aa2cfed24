import json
import math

import pytest

from normlab.bench import layers, timing
from normlab.bench.timing import take_turns


def test_peers_take_turns_and_get_the_median_of_their_rounds():
    order = []
    peers = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = take_turns(peers, seconds=0.0, least=9)
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 9, "b": 9}
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs[-18:] == ["a", "b"] * 9  # Both in every round, and not one after the other.
    assert all(t.low <= t.median <= t.high for t in timings.values())


@pytest.mark.parametrize(("slow", "calls"), [(2e-3, 50), (0.02, 5), (0.3, 1)])
def test_peers_are_called_equally_often_and_slow_ones_once_a_round(slow, calls, monkeypatch):
    counts = {1e-6: 0, slow: 0}

    def timed(call, times):
        seconds = call()
        counts[seconds] += times
        return seconds

    monkeypatch.setattr(timing, "_seconds", timed)
    peers = {"short": lambda: 1e-6, "long": lambda: slow}
    take_turns(peers, seconds=0.0, least=7)
    assert counts == dict.fromkeys(counts, 1 + 7 * calls)  # The first is to see how long it takes.


def test_a_slower_peer_is_measured_as_slower():
    def sums(values):
        return lambda: sum(range(values))

    timings = take_turns({"much": sums(200_000), "little": sums(200)}, seconds=0.05)
    assert timings["much"].median > 10 * timings["little"].median


@pytest.fixture(scope="module")
def benchmark():
    return layers.bench_layers(
        seconds=0.0,
        compiled=False,
        shapes=[(8, 3, 16, 16), (32, 32)],
        networks={"lenet": ("lenet", (1, 28, 28), 8)},
    )


def test_every_shape_layout_and_job_is_a_row_with_its_ratios(benchmark):
    frame = benchmark.frame()
    assert len(frame) == 3 * (2 + 1)
    assert list(frame["job"].unique()) == list(layers.JOBS)
    assert list(frame["layout"][:3]) == ["NCHW", "channels_last", "(N, C)"]
    for row, (_, columns) in zip(benchmark.rows, frame.iterrows(), strict=True):
        ours = row.timings["normlab"].median
        assert math.isclose(columns["against torch"], row.timings["torch"].median / ours)
        # A copy reads and writes one tensor in inference, and two in training.
        share = 2 / 2 if row.job.startswith("inference") else 5 / 4
        assert math.isclose(row.floor, row.timings["copy"].median * share)
        assert math.isclose(columns["share of the memory floor's speed"], row.floor / ours)


def test_the_step_of_a_fused_layer_needs_less_memory_than_torchs(benchmark):
    assert benchmark.memory["normlab"] < benchmark.memory["torch"] - 0.9  # Of an activation.


def test_json_and_text_hold_versions_machine_and_every_figure(benchmark):
    document = json.loads(json.dumps(benchmark.to_json()))
    assert document["versions"].keys() == {"normlab", "torch", "python"}
    assert document["machine"] == benchmark.machine
    assert len(document["rows"]) == len(benchmark.rows)
    text = str(benchmark)
    assert all(job in text for job in layers.JOBS)
    assert f"lenet: torch {benchmark.networks['lenet']['torch'].median * 1e3:.1f} ms" in text
