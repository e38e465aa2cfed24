import math
from types import SimpleNamespace

import pandas as pd
import pytest

from normlab.claims import CLAIMS
from normlab.claims.catalog.max_learning_rate import accuracies, rates_that_train
from normlab.claims.evidence import weigh

CLAIM = CLAIMS["max-learning-rate"]
(PART,) = CLAIM.parts


def frame(by_arm):
    """By arm, for each seed the accuracies at the rates 1, 2, 4 and 8."""
    rows = [
        (seed, arm, "training accuracy at the end", 2.0**k, value)
        for arm, seeds in by_arm.items()
        for seed, values in enumerate(seeds)
        for k, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def effects(by_arm):
    return CLAIM.effects(frame(by_arm))[PART.name]


def test_a_rate_trains_from_80_percent_of_the_best_on():
    assert rates_that_train({1: 0.5, 2: 0.4, 4: 0.399, 8: 0.41}) == [1, 2, 8]
    assert rates_that_train({1: math.nan, 2: 0.1}) == [2]
    assert rates_that_train({1: math.nan}) == []


def test_doublings_are_counted_between_the_largest_rates_of_a_seed():
    nan = math.nan
    plain = [[0.5, 0.6, 0.1, nan], [0.7, 0.1, nan, nan]]
    batch = [[0.6, 0.7, 0.7, 0.6], [0.6, 0.9, 0.75, 0.2]]
    assert effects({"plain": plain, "batch": batch}) == [2.0, 2.0]
    assert effects({"plain": batch, "batch": plain}) == [-2.0, -2.0]


def test_an_arm_that_diverges_at_every_rate_has_failed():
    gone, fine = [math.nan] * 4, [0.5] * 4
    values = effects({"plain": [gone, fine, gone], "batch": [fine, gone, gone]})
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])


@pytest.mark.parametrize(("doublings", "word"), [(2, "supported"), (0, "refuted")])
def test_the_verdict_follows_the_doublings(doublings, word):
    plain = [[0.5, 0.1, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]] * 5
    batch = [[0.5] * (k % 2 + 1 + doublings) + [0.1] * 4 for k in range(10)]
    values = effects({"plain": plain, "batch": [each[:4] for each in batch]})
    assert weigh(PART, values).word == word


def test_the_accuracy_is_that_on_training_images_at_the_last_step():
    def measured(arm, lr, step, split, value, metric="accuracy"):
        return {
            **{"arm": arm, "lr": lr, "seed": 3, "step": step},
            **{"split": split, "metric": metric, "value": value},
        }

    measurements = [
        measured("plain", 0.1, 20, "train", 0.6),
        measured("plain", 0.1, 10, "train", 0.9),
        measured("plain", 0.1, 20, "test", 0.3),
        measured("plain", 0.1, 20, "train", 7.0, "loss"),
        measured("plain", 0.2, 10, "train", 0.8),
    ]
    replicas = [
        {"arm": "plain", "lr": 0.1, "seed": 3, "status": "done"},
        {"arm": "plain", "lr": 0.2, "seed": 3, "status": "diverged"},
    ]
    comparison = SimpleNamespace(
        frame=lambda: pd.DataFrame(measurements), replicas=lambda: pd.DataFrame(replicas)
    )
    found = accuracies(comparison)
    assert set(found) == {("plain", 3)}
    assert found["plain", 3][0.1] == 0.6
    assert math.isnan(found["plain", 3][0.2])


def test_the_chart_shows_a_run_that_diverged():
    nan = math.nan
    chart = CLAIM.chart(frame({"plain": [[0.5, nan, nan, nan]] * 3, "batch": [[0.5] * 4] * 3}))
    (values, *_) = [*chart.to_dict()["datasets"].values()]
    assert [row["mean"] for row in values if row["arm"] == "plain"] == [0.5, 0, 0, 0]
