import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from normlab.claims import CLAIMS
from normlab.claims.claim import Row
from normlab.claims.effects import of_arm
from normlab.claims.readings import readings

SHIFT, SMOOTH = CLAIMS["covariate-shift"], CLAIMS["smoothness"]


def comparison(rows, replicas):
    columns = ["arm", "seed", "step", "probe", "layer", "name", "value"]
    return SimpleNamespace(
        probes=lambda: pd.DataFrame(rows, columns=columns),
        replicas=lambda: pd.DataFrame(replicas, columns=["arm", "seed", "status", "step"]),
    )


def frame(rows):
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_readings_are_means_over_layers_at_each_step():
    rows = [
        ("plain", 0, 0, "shift", "a", "shift", 2.0),
        ("plain", 0, 0, "shift", "b", "shift", 8.0),
        ("plain", 0, 5, "shift", "a", "shift", 4.0),
        ("plain", 0, 5, "shift", "b", "shift", 4.0),
        ("plain", 0, 5, "shift", "b", "cosine", 99.0),
        ("plain", 0, 5, "other", "b", "shift", 99.0),
        ("batch", 0, 0, "shift", "a", "shift", 1.0),
        ("plain", 1, 0, "shift", "a", "shift", 16.0),
    ]
    ends = [("plain", 0, "done", 9), ("batch", 0, "done", 9), ("plain", 1, "done", 9)]
    found = readings(comparison(rows, ends), "shift", "shift", "q")
    assert found[0] == [
        Row("plain", "q", 0.0, 5.0),
        Row("plain", "q", 5.0, 4.0),
        Row("batch", "q", 0.0, 1.0),
    ]
    logs = readings(comparison(rows, ends), "shift", "shift", "q", log=True)
    assert [row.value for row in logs[0]] == [2.0, 2.0, 0.0]
    assert [row.value for row in logs[1]] == [4.0]


def test_a_replica_that_diverged_has_no_course_though_it_had_readings():
    rows = [
        ("plain", 0, 0, "shift", "a", "shift", 2.0),
        ("batch", 0, 0, "shift", "a", "shift", 2.0),
    ]
    ends = [("plain", 0, "diverged", 40), ("batch", 0, "done", 80)]
    first, second = readings(comparison(rows, ends), "shift", "shift", "q")[0]
    assert (first.arm, first.at) == ("plain", 40.0)
    assert math.isnan(first.value)
    assert second == Row("batch", "q", 0.0, 2.0)


def test_what_is_not_finite_is_not_left_out_of_a_mean():
    rows = frame(
        [
            *((3, "plain", "q", 0, 1.0), (3, "plain", "q", 1, 4.0)),
            *((2, "plain", "q", 0, 1.0), (2, "plain", "q", 1, math.nan)),
            *((1, "plain", "q", 0, 1.0), (1, "plain", "q", 1, -math.inf)),
            *((1, "plain", "other", 0, 9.0), (1, "batch", "q", 0, 9.0)),
        ]
    )
    found = of_arm(rows, "plain", "q", np.mean)
    assert np.array_equal(found, [-math.inf, math.nan, 2.5], equal_nan=True)


def test_shift_is_as_claimed_unless_batch_norm_makes_it_less():
    def effects(plain, batch):
        rows = [
            (seed, arm, f"{setup}: {quantity}", step, value)
            for setup in ("ReLU", "linear")
            for arm, values in (("plain", plain), ("batch", batch))
            for quantity, value in zip(("log₂ ‖G − G′‖", "cos(G, G′)"), values, strict=True)
            for seed in range(2)
            for step in (0, 5)
        ]
        found = SHIFT.effects(frame(rows))
        assert list(found) == [part.name for part in SHIFT.parts]
        return [values[1] for values in found.values()]

    assert effects((1.0, 0.9), (1.0, 0.9)) == pytest.approx([0.5, 0.05] * 2)
    assert effects((1.0, 0.9), (3.0, 0.1)) == pytest.approx([2.5, 0.85] * 2)
    assert effects((1.0, 0.1), (0.0, 0.9)) == pytest.approx([-0.5, -0.75] * 2)
    assert effects((math.nan, math.nan), (0.0, 0.9)) == [-math.inf] * 4
    assert effects((0.0, 0.9), (math.nan, math.nan)) == [math.inf] * 4


def test_smoothness_is_in_doublings_by_which_batch_norm_has_less():
    kinds = [part.name for part in SMOOTH.parts]

    def effects(plain, batch):
        rows = [
            (seed, arm, kind, step, value + step)
            for arm, values in (("plain", plain), ("batch", batch))
            for kind, value in zip(kinds, values, strict=True)
            for seed in range(2)
            for step in (0, 1)
        ]
        return SMOOTH.effects(frame(rows))

    found = effects((3.0, 1.0), (1.0, 1.5))
    assert found == {kinds[0]: [2.0, 2.0], kinds[1]: [-0.5, -0.5]}
    # The loss of a network that diverged varies without bounds.
    found = effects((math.nan, 1.0), (1.0, math.nan))
    assert found == {kinds[0]: [math.inf] * 2, kinds[1]: [-math.inf] * 2}


@pytest.mark.parametrize("claim", [SHIFT, SMOOTH])
def test_charts_have_a_panel_for_each_quantity(claim):
    quantities = (
        [f"{s}: {q}" for s in ("ReLU", "linear") for q in ("log₂ ‖G − G′‖", "cos(G, G′)")]
        if claim is SHIFT
        else [part.name for part in claim.parts]
    )
    rows = [
        (seed, arm, quantity, step, float(k))
        for seed in range(3)
        for arm in ("plain", "batch")
        for k, quantity in enumerate(quantities)
        for step in (0, 5)
    ]
    chart = claim.chart(frame(rows)).to_dict()
    means = [
        {row["mean"] for row in values if "mean" in row} for values in chart["datasets"].values()
    ]
    assert len(chart["vconcat"]) == len(quantities)
    assert sorted(map(tuple, means)) == [(float(k),) for k in range(len(quantities))]
