"""Claims that rest on studies: what they ask for, and what they make of numbers."""

import math
from pathlib import Path

import pandas as pd
import platformdirs
import pytest

from normlab.claims import CLAIMS, Work, check
from normlab.claims.catalog import accuracy, stable_inputs
from normlab.claims.evidence import weigh
from normlab.claims.setups import tutorial

NAMES = ("faster", "stable-inputs", "deep-sigmoid", "accuracy", "dropout-rival")
_USERS = Path(platformdirs.user_cache_path("normlab", appauthor=False)) / "data"


def frame_of(quantity, **arms):
    """Rows of one quantity: for each arm its values, one a seed."""
    rows = [
        (seed, arm.replace("_", ":"), quantity, 0.0, value)
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def only(effects):
    (values,) = effects.values()
    return values


def test_faster_counts_doublings_and_who_never_arrives_takes_for_ever():
    nan = math.nan
    frame = frame_of(
        "steps to 95% test accuracy",
        plain=[400.0, 300.0, nan, 200.0, nan],
        batch=[100.0, 600.0, 200.0, nan, nan],
    )
    *known, neither = only(CLAIMS["faster"].effects(frame))
    assert known == [2.0, -1.0, math.inf, -math.inf]
    assert math.isnan(neither)


def test_faster_is_not_supported_by_what_a_step_with_batch_norm_costs_more():
    (part,) = CLAIMS["faster"].parts
    steps = [1.2, 1.21, 1.19, 1.2, 1.22]
    frame = frame_of(part.name, plain=steps, batch=[1.0] * 5)
    frame["quantity"] = "steps to 95% test accuracy"
    assert weigh(part, only(CLAIMS["faster"].effects(frame))).word == "refuted"


def test_accuracy_is_batch_norms_less_that_without_in_points_of_each_study():
    parts = CLAIMS["accuracy"].parts
    frames = [frame_of(part.name, plain=[0.5], batch=[0.6]) for part in parts]
    found = CLAIMS["accuracy"].effects(pd.concat(frames))
    assert found == {part.name: [pytest.approx(10.0)] for part in parts}


def test_drift_is_the_way_of_the_middle_in_widths():
    # |1 − 0| + |−2 − 1| + |−2 + 2| = 4; the widths are 2, 4, 1 and 8, their median 3.
    low, middle, high = [-1.0, -1.0, -2.5, -6.0], [0.0, 1.0, -2.0, -2.0], [1.0, 3.0, -1.5, 2.0]
    assert stable_inputs.drift(low, middle, high) == pytest.approx(4 / 3)
    scaled = ([10 * value - 3 for value in values] for values in (low, middle, high))
    assert stable_inputs.drift(*scaled) == pytest.approx(4 / 3)


def readings(courses, layer="hidden2.activation"):
    """What a probe reads of one seed: for each arm the middles; widths are 2 and 1."""
    rows = []
    for arm, course in courses.items():
        # Not in the order of time.
        for step, middle in reversed(list(enumerate(course))):
            for prefix, half in (("", 1.0), ("unit.", 0.5)):
                for name, value in zip(
                    ("q15", "q50", "q85"), (middle - half, middle, middle + half), strict=True
                ):
                    rows.append((arm, 0, 100 * step, "percentiles", layer, prefix + name, value))
    columns = ["arm", "seed", "step", "probe", "layer", "name", "value"]
    return pd.DataFrame(rows, columns=columns)


def stable_frame(probes, diverged=frozenset()):
    rows = [
        (seed, *row) for seed, some in stable_inputs._rows(probes, diverged).items() for row in some
    ]
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_stable_inputs_looks_at_the_last_layer_and_in_the_order_of_time():
    probes = pd.concat(
        [
            readings({"plain": [0.0, 2.0, 4.0, 0.0], "batch": [0.0, 1.0, 0.0, 0.0]}),
            readings({"plain": [0.0, 9.0], "batch": [0.0, 9.0]}, layer="hidden1.activation"),
        ]
    )
    frame = stable_frame(probes)
    drifts = frame[frame["quantity"].str.startswith("drift")].set_index(["arm", "quantity"])[
        "value"
    ]
    assert drifts["plain", "drift, the layer"] == 8 / 2
    assert drifts["plain", "drift, a unit"] == 8 / 1
    assert drifts["batch", "drift, a unit"] == 2 / 1
    assert list(CLAIMS["stable-inputs"].effects(frame).values()) == [[2.0], [2.0]]
    middles = frame[(frame["quantity"] == "q50, a unit") & (frame["arm"] == "plain")]
    assert list(middles["at"]) == [0, 100, 200, 300]
    assert list(middles["value"]) == [0, 2, 4, 0]


def test_nothing_is_less_stable_than_what_diverged():
    probes = readings({"plain": [0.0, 0.1], "batch": [0.0, 5.0]})
    effects = CLAIMS["stable-inputs"].effects(stable_frame(probes, {("plain", 0)}))
    assert list(effects.values()) == [[math.inf], [math.inf]]


def test_deep_sigmoid_asks_for_more_than_a_linear_network():
    claim = CLAIMS["deep-sigmoid"]
    frame = frame_of("final test accuracy", plain=[0.11, 0.95, 0.1], batch=[0.96, 0.90, math.nan])
    gain, trains = (claim.effects(frame)[part.name] for part in claim.parts)
    assert gain == [pytest.approx(85), pytest.approx(-5), -math.inf]
    assert trains == [pytest.approx(4), pytest.approx(-2), -math.inf]


def test_dropout_rival_allows_the_margin():
    claim = CLAIMS["dropout-rival"]
    frame = frame_of(
        "final test accuracy",
        plain=[0.5] * 6,
        batch=[0.500, 0.501, 0.502, 0.499, 0.500, 0.498],
        dropout_0=[0.0] * 6,
    )
    rows = [frame[frame["arm"] != "dropout:0"]]
    for arm, less in (("batch+dropout:0.5", 0.005), ("dropout:0.5", 0.02)):
        rival = frame[frame["arm"] == "batch"].assign(arm=arm)
        rows.append(rival.assign(value=rival["value"] + less))
    effects = claim.effects(pd.concat(rows))
    words = [
        weigh(part, [v + 0.001 * k for k, v in enumerate(effects[part.name])], 2).word
        for part in claim.parts
    ]
    assert [effects[part.name][0] for part in claim.parts] == [
        pytest.approx(0.5),
        pytest.approx(-1.0),
    ]
    assert words == ["supported", "refuted"]


class Asked:
    """Stands in for a comparison of which nobody asks more than the outcomes."""

    def __init__(self, study):
        self.study = study

    def outcomes(self):
        rows = [
            {"arm": arm, "seed": seed, "lr": 0.1, "best_validation_test_accuracy": len(arm) / 10}
            for arm in self.study.arms
            for seed in self.study.seeds
        ]
        return pd.DataFrame(rows).set_index(["arm", "seed"])


@pytest.mark.parametrize("quick", [False, True])
def test_accuracy_takes_both_networks_of_five_studies(quick, monkeypatch, tmp_path):
    asked = []

    def compare(_, study):
        asked.append(study)
        return Asked(study)

    monkeypatch.setattr(Work, "compare", compare)
    rows = dict(CLAIMS["accuracy"].measure(Work((3, 4), quick, tmp_path)))
    assert set(rows) == {3, 4}
    assert sorted((row.arm, row.quantity) for row in rows[3]) == sorted(
        (arm, name) for arm in ("plain", "batch") for name in accuracy._STUDIES
    )
    names = [study.name for study in asked]
    if quick:
        assert names == list(accuracy._STUDIES)
        assert max(study.epochs for study in asked) == 2
        assert asked[-1].arms == ("plain", "batch")
    else:
        # As they are, so that the folder of a run of `normlab compare` will do.
        assert asked[:-1] == [tutorial(name, quick=False) for name in accuracy._STUDIES]
        assert (asked[-1].name, asked[-1].arms) == ("fashion-lenet-sigmoid-more", ("plain",))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_ends_with_a_verdict_and_a_chart(name, tmp_path, monkeypatch):
    needed = {"accuracy": ["cifar10", "fashion-mnist"], "dropout-rival": ["cifar10"]}.get(name, [])
    for dataset in needed:
        if not (_USERS / f"{dataset}.safetensors").exists():
            pytest.skip(f"{dataset} is not here: normlab data fetch {dataset}")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").symlink_to(_USERS)
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    result = check(name, quick=True, out=tmp_path / "claims")
    assert result.complete
    assert result.verdict in ("supported", "refuted", "inconclusive")
    assert len(result.evidence) == len(CLAIMS[name].parts)
    assert result.chart().to_dict()
