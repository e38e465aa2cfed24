import math

import pandas as pd

from normlab.claims import CLAIMS, Work
from normlab.claims.catalog import noisy_bn
from normlab.study import Study

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


def test_rows_are_each_arms_accuracy_at_the_rate_that_it_chose(tmp_path, monkeypatch):
    def small(prefix, _):
        function = noisy_bn._NETWORKS[prefix].__name__
        return Study(
            **{"name": function.replace("_", "-"), "network": f"normlab.claims.noise:{function}"},
            **{"validation": 59_800, "seeds": 3, "epochs": 1, "lr": (0.01, 0.1), "batch_size": 50},
        )

    monkeypatch.setattr(noisy_bn, "_study", small)
    work = Work((1, 2), True, tmp_path)
    found = dict(CLAIM.measure(work))
    assert list(found) == [1, 2]
    arms = ["plain", "batch", "noisy plain", "noisy batch"]
    assert [row.arm for row in found[2]] == arms
    expected = work.compare(small("noisy ", True)).outcomes()["final_test_accuracy"]
    assert [row.value for row in found[2][2:]] == [expected["plain", 2], expected["batch", 2]]
    assert len({row.value for row in found[2]}) > 2


def test_quick_and_full_runs_are_different_studies_of_the_same_arms():
    for prefix in ("", "noisy "):
        quick, full = (noisy_bn._study(prefix, is_quick) for is_quick in (True, False))
        assert quick.arms == full.arms == ("plain", "batch")
        assert quick.lr == full.lr
        assert quick.fingerprint != full.fingerprint
