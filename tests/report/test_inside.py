import math
from itertools import product

import numpy as np
import pytest
import vl_convert
from scipy import stats

from normlab.probes import PROBES, Histogram
from normlab.report import chart, inside_charts
from normlab.study import Comparison, Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Reading, Replica
from normlab.training.networks import Layer

READ = {
    "percentiles": ["activation-percentiles", "unit-percentiles"],
    "gradients": ["output-gradients", "weight-gradients"],
    "units": ["dead-units", "saturated-units"],
    "smoothness": [
        *("loss-range", "relative-loss-range", "gradient-change", "relative-gradient-change"),
    ],
    "covariate-shift": ["gradient-shift", "gradient-cosine"],
}


def rows(chart):
    (found,) = chart.to_dict(validate=True)["datasets"].values()
    return found


def values(comparison, arm, layer, name, step):
    frame = comparison.probes()
    for column, value in {"arm": arm, "layer": layer, "name": name, "step": step}.items():
        frame = frame[frame[column] == value]
    return frame.sort_values("seed")["value"].to_numpy()


@pytest.fixture
def kept(tmp_path):
    """Keeps events of a small study in a ledger, and returns the comparison."""

    def keep(*events, layers=None, **fields):
        study = Study(**{"arms": ["batch"], "epochs": 1, "seeds": 2, **fields})
        with Ledger.write(tmp_path, study) as ledger:
            ledger.begin_session(1)
            for arm, names in (layers or {}).items():
                ledger.describe(arm, [Layer(name, "x", (), 0) for name in names])
            for event in events:
                ledger.add(event, 1.0)
        return Comparison(tmp_path)

    return keep


def measured(replica, step, histograms, epoch=1):
    scores = {(split, m): 0.5 for split in ("train", "test") for m in ("loss", "accuracy")}
    return Measurement(replica, step, epoch, scores, histograms)


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_has_its_charts_and_they_can_be_drawn(compared, probe):
    charts = inside_charts(compared(seeds=3, probes=[probe]))
    assert list(charts) == READ[probe]
    for each in charts.values():
        spec = each.to_dict(validate=True)
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.startswith("<svg")
        assert "NaN" not in svg
        assert f">{spec['title']['text']}</text>" in svg


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"probes": list(PROBES), "missing": lambda _: True},
        {"probes": list(PROBES), "running": lambda _: True},
        {"probes": list(PROBES), "diverged": lambda _: True},
    ],
    ids=["no probes", "nothing done", "nothing finished", "all diverged"],
)
def test_where_there_is_nothing_to_show_there_is_no_chart(compared, options):
    assert inside_charts(compared(seeds=2, **options)) == {}


def test_a_line_is_a_mean_over_seeds_and_a_band_its_interval(compared):
    comparison = compared(seeds=4, probes=["percentiles"], confidence=0.9)
    found = rows(inside_charts(comparison)["unit-percentiles"])
    assert len(found) == 2 * 3 * 5
    (row,) = [r for r in found if (r["arm"], r["line"], r["step"]) == ("batch", "q50", 200)]
    seen = values(comparison, "batch", "hidden0.activation", "unit.q50", 200)
    half = stats.t.ppf(0.95, 3) * stats.sem(seen)
    assert row["mean"] == pytest.approx(seen.mean(), rel=1e-12)
    assert row["low"] == pytest.approx(seen.mean() - half, rel=1e-9)
    assert row["high"] == pytest.approx(seen.mean() + half, rel=1e-9)
    assert (row["n"], row["epochs"]) == (4, 2)


def test_on_a_log_scale_the_mean_is_geometric(compared):
    comparison = compared(seeds=3, probes=["gradients"])
    chart = inside_charts(comparison)["weight-gradients"]
    (row,) = [r for r in rows(chart) if (r["arm"], r["layer"], r["step"]) == ("plain", "output", 0)]
    seen = np.log(values(comparison, "plain", "output", "weight", 0))
    half = stats.t.ppf(0.975, 2) * stats.sem(seen)
    assert row["mean"] == pytest.approx(math.exp(seen.mean()), rel=1e-9)
    assert row["low"] == pytest.approx(math.exp(seen.mean() - half), rel=1e-9)
    assert row["high"] == pytest.approx(math.exp(seen.mean() + half), rel=1e-9)
    assert chart.to_dict()["title"]["subtitle"].startswith("geometric mean of 3 seeds;")


def test_only_runs_that_finished_at_the_reported_setting_are_in_it(compared):
    comparison = compared(
        seeds=4,
        lr=[0.1, 0.01],
        probes=["units"],
        diverged=lambda one: one.arm == "batch" and one.seed == 2,
    )
    assert {arm: setting.lr for arm, setting in comparison.reported.items()} == {
        "plain": 0.01,
        "batch": 0.01,
    }
    found = rows(inside_charts(comparison)["dead-units"])
    assert {(r["arm"], r["n"]) for r in found} == {("plain", 4), ("batch", 3)}
    (row,) = [r for r in found if (r["arm"], r["step"]) == ("batch", 100)]
    frame = comparison.probes()
    frame = frame[(frame["lr"] == 0.01) & (frame["seed"] != 2) & (frame["name"] == "dead")]
    seen = frame[(frame["arm"] == "batch") & (frame["step"] == 100)]["value"]
    assert row["mean"] == pytest.approx(seen.mean())


def test_a_number_that_a_seed_lacks_is_the_mean_of_the_others(kept):
    events = []
    for seed, seen in enumerate([{"dead": 0.5}, {}]):
        replica = Replica("batch", 0.01, seed)
        events.append(measured(replica, 10, {}))
        events.append(Reading(replica, 0, 0, {"units": {"a": {"dead": 0.25}}}))
        events.append(Reading(replica, 10, 1, {"units": {"a": seen}}))
        events.append(Outcome(replica, "done", 10, 1.0))
    found = rows(inside_charts(kept(*events, probes="units"))["dead-units"])
    assert [(r["step"], r["mean"], r["n"]) for r in found] == [(0, 0.25, 2), (10, 0.5, 1)]


def test_gamma_and_beta_are_the_channels_of_all_seeds(kept):
    events = []
    for seed, low in enumerate([0.0, 30.0]):
        replica = Replica("batch", 0.01, seed)
        seen = {
            "weight": Histogram(low, low + 30, [1] * 30),
            "bias": Histogram(2.0, 2.0, [0] * 29 + [8]),
        }
        events.append(measured(replica, 10, {"a.norm": seen}))
        events.append(Outcome(replica, "done", 10, 1.0))
    charts = inside_charts(kept(*events))
    assert list(charts) == ["gamma", "beta"]
    (gamma,), (beta,) = rows(charts["gamma"]), rows(charts["beta"])
    # Values 0.5, 1.5, … 59.5, of which the third is the first that 5% reach.
    assert (gamma["mean"], gamma["low"], gamma["high"]) == (30.0, 2.5, 56.5)
    assert (beta["mean"], beta["low"], beta["high"]) == (2.0, 2.0, 2.0)
    assert (gamma["layer"], gamma["epochs"], gamma["n"]) == ("a.norm", 1, 2)


def test_panels_stand_in_the_order_of_the_pass(kept):
    layers = ["z.linear", "m.norm", "a.act", "b.out"]
    events = []
    for arm, seed in product(["plain", "batch"], range(2)):
        replica = Replica(arm, 0.01, seed)
        seen = {name: {"weight": 1.0} for name in ("a.act (call 2)", *reversed(layers))}
        events.append(measured(replica, 10, {}))
        events.append(Reading(replica, 10, 1, {"gradients": seen}))
        events.append(Outcome(replica, "done", 10, 1.0))
    by_arm = {"plain": ["z.linear", "a.act", "b.out"], "batch": layers}
    comparison = kept(*events, layers=by_arm, arms=list(by_arm), probes="gradients")
    spec = inside_charts(comparison)["weight-gradients"].to_dict()
    order = ["z.linear", "m.norm", "a.act", "a.act (call 2)", "b.out"]
    assert spec["facet"]["sort"] == order


def test_an_arm_has_its_shape_and_colour_and_is_named_only_where_it_is_drawn(kept):
    replicas = [Replica(arm, 0.01, 0) for arm in ("plain", "batch", "layer")]
    gamma = {"hidden0.norm": {"weight": Histogram(0.5, 1.5, [1, 1])}}
    events = []
    for replica in replicas:
        events.append(measured(replica, 10, {} if replica.arm == "plain" else gamma))
        events.append(Outcome(replica, "done", 10, 1.0))
    comparison = kept(*events, arms=["plain", "batch", "layer"], seeds=1)
    encodings = [
        layer["encoding"]
        for layer in inside_charts(comparison)["gamma"].to_dict()["spec"]["layer"]
        if "shape" in layer["encoding"]
    ]
    curve = chart(comparison).to_dict()["spec"]["layer"][2]["encoding"]
    for channel in ("color", "shape"):
        arms, looks = (curve[channel]["scale"][key] for key in ("domain", "range"))
        everywhere = dict(zip(arms, looks, strict=True))
        (scale,) = [one[channel]["scale"] for one in encodings]
        assert scale["domain"] == ["batch", "layer"]
        assert scale["range"] == [everywhere[arm] for arm in scale["domain"]]
