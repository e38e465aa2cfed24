import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from normlab.claims import CLAIMS, Work
from normlab.claims.catalog import noisy_bn

CLAIM = CLAIMS["noisy-bn"]
BENEFIT, COST = CLAIM.parts


def effects(by_arm):
    rows = [
        (seed, arm, "test accuracy at the end", 0, value)
        for arm, values in by_arm.items()
        for seed, value in enumerate(values)
    ]
    return CLAIM.effects(pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"]))


def test_effects_are_points_and_failures_take_sides():
    found = effects(
        {
            "plain": [0.5, math.nan],
            "batch": [0.75, 0.75],
            "noisy plain": [0.1, 0.1],
            "noisy batch": [0.625, 0.5],
        }
    )
    assert found == {BENEFIT.name: [12.5, math.inf], COST.name: [-12.5, -25.0]}


def test_rows_are_what_each_arm_ended_with_in_its_study(monkeypatch):
    def outcomes(first):
        index = [(arm, seed) for arm in ("plain", "batch") for seed in range(3)]
        values = [first + k for k in range(6)]
        return pd.DataFrame(
            {"final_test_accuracy": values},
            index=pd.MultiIndex.from_tuples(index, names=["arm", "seed"]),
        )

    tables = {"claims-steady-perceptron": outcomes(10.0), "claims-noisy-perceptron": outcomes(20.0)}
    monkeypatch.setattr(
        Work, "compare", lambda _, study: SimpleNamespace(outcomes=lambda: tables[study.name])
    )
    found = dict(CLAIM.measure(Work((1, 2), True, Path())))
    arms = ["plain", "batch", "noisy plain", "noisy batch"]
    assert [row.arm for row in found[1]] == arms
    assert {seed: [row.value for row in rows] for seed, rows in found.items()} == {
        1: [11.0, 14.0, 21.0, 24.0],
        2: [12.0, 15.0, 22.0, 25.0],
    }


def test_quick_and_full_runs_are_different_studies_of_the_same_arms():
    for prefix in ("", "noisy "):
        quick, full = (noisy_bn._study(prefix, is_quick) for is_quick in (True, False))
        assert quick.arms == full.arms == ("plain", "batch")
        assert quick.lr == full.lr
        assert quick.fingerprint != full.fingerprint
