"""Accuracy by learning rate, and ranges, held against numbers worked out by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normlab.errors import InputError
from normlab.study import Comparison, RateRange, Study, widest_range
from normlab.study.ledger import Ledger
from normlab.study.sensitivity import own_decades, range_difference
from normlab.training import Measurement, Outcome, Replica

RATES = [0.001, 0.01, 0.1, 1.0]
T_5 = 2.570581835636314  # Student's t that 2.5% exceed, of six values.
T_2 = 4.302652729911275  # Of three.


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        # The best lies inside, and both neighbours beyond the range are further off than a point.
        ([0.90, 0.95, 0.945, 0.93], RateRange(0.01, 0.01, 0.1, False, False)),
        # A point, to the last digit, is within a point; a hundredth of one more is not.
        ([0.90, 0.95, 0.94, 0.90], RateRange(0.01, 0.01, 0.1, False, False)),
        ([0.90, 0.95, 0.9399, 0.90], RateRange(0.01, 0.01, 0.01, False, False)),
        # Nor do the last digits of a mean make one rate better than another, or further off.
        ([0.29, 0.1 + 0.2, 0.2, 0.2], RateRange(0.01, 0.001, 0.01, True, False)),
        ([0.2, 0.3, 0.1 + 0.2, 0.2], RateRange(0.01, 0.01, 0.1, False, False)),
        # The range ends with the rates tried, at one end, at the other, at both.
        ([0.95, 0.945, 0.5, 0.5], RateRange(0.001, 0.001, 0.01, True, False)),
        ([0.5, 0.5, 0.945, 0.95], RateRange(1.0, 0.1, 1.0, False, True)),
        ([0.945, 0.95, 0.945, 0.941], RateRange(0.01, 0.001, 1.0, True, True)),
        # What is near the best, but not next to it, is not in its range.
        ([0.949, 0.90, 0.95, 0.90], RateRange(0.1, 0.1, 0.1, False, False)),
        # Of two that are best: the wider range; of equally wide ones, and in one, the lower.
        ([0.95, 0.90, 0.95, 0.945], RateRange(0.1, 0.1, 1.0, False, True)),
        ([0.95, 0.90, 0.95, 0.90], RateRange(0.001, 0.001, 0.001, True, False)),
        ([0.90, 0.95, 0.95, 0.90], RateRange(0.01, 0.01, 0.1, False, False)),
        # A rate at which all diverged is not near the best, unless no rate is any better.
        ([0.95, 0.0, 0.0, 0.0], RateRange(0.001, 0.001, 0.001, True, False)),
        ([0.005, 0.0, 0.0, 0.9], RateRange(1.0, 1.0, 1.0, False, True)),
        ([0.0, 0.0, 0.0, 0.0], None),
    ],
)
def test_the_range_around_the_best_rate(accuracies, expected):
    assert widest_range(RATES, accuracies) == expected


def test_a_range_is_as_wide_as_its_logarithm():
    assert RateRange(0.01, 0.01, 0.1, False, False).decades == pytest.approx(1)
    assert widest_range([0.002, 0.01], [0.9, 0.9]).decades == pytest.approx(math.log10(5))
    assert widest_range([0.5], [0.9]) == RateRange(0.5, 0.5, 0.5, True, True)


def test_how_near_is_near_can_be_said():
    assert widest_range(RATES, [0.93, 0.95, 0.945, 0.90], within=0.02).low == 0.001
    assert widest_range(RATES, [0.93, 0.95, 0.945, 0.90], within=0.0).decades == 0


@pytest.mark.parametrize(
    ("rates", "accuracies", "message"),
    [
        ([0.1, 0.2], [0.9], r"got 2 rates and accuracies of shape \(1,\)"),
        ([], [], r"got 0 rates and accuracies of shape \(0,\)"),
        ([0.2, 0.1], [0.9, 0.9], r"rates that ascend from above 0, got \[0.2, 0.1\]"),
        ([0.1, 0.1], [0.9, 0.9], r"rates that ascend from above 0, got \[0.1, 0.1\]"),
        ([0.0, 0.1], [0.9, 0.9], r"rates that ascend from above 0, got \[0.0, 0.1\]"),
    ],
)
def test_rates_that_cannot_be_used_are_refused(rates, accuracies, message):
    with pytest.raises(InputError, match=message):
        widest_range(rates, accuracies)


@given(st.lists(st.integers(1, 40).map(lambda k: k / 200), min_size=1, max_size=8))
def test_a_range_is_what_its_definition_says(accuracies):
    """Against all ranges there are, one by one."""
    k, best = len(accuracies), max(accuracies)
    rates = [10.0**i for i in range(k)]
    widths = [
        high - low
        for low in range(k)
        for high in range(low, k)
        if best in accuracies[low : high + 1]
        and all(best - value <= 0.01 + 1e-9 for value in accuracies[low : high + 1])
    ]
    found = widest_range(rates, accuracies)
    assert found.decades == pytest.approx(max(widths))
    assert found.low <= found.best <= found.high
    assert accuracies[rates.index(found.best)] == best


def test_ranges_are_compared_seed_by_seed():
    ours = own_decades(RATES, [[0.90, 0.95, 0.95, 0.95], [0.95] * 4, [0.90, 0.95, 0.95, 0.90]])
    theirs = own_decades(RATES, [[0.90, 0.95, 0.95, 0.90], [0.9, 0.95, 0.95, 0.95], [0.9, 0, 0, 0]])
    assert ours == pytest.approx([2, 3, 1])
    assert theirs == pytest.approx([1, 2, 0])
    assert range_difference(ours, theirs)[:1] == (1,)
    differences = np.array([1.0, 2.0, 0.0])
    one = range_difference(differences, np.zeros(3))
    half = T_2 * differences.std(ddof=1) / math.sqrt(3)
    assert (one.mean, one.low, one.high) == pytest.approx((1, 1 - half, 1 + half))
    assert range_difference(differences, np.zeros(3), confidence=0.5).high < one.high


def test_without_a_spread_or_a_range_there_is_no_interval():
    def numbers(ours, theirs):
        found = range_difference(ours, theirs)
        return [None if math.isnan(number) else number for number in found]

    assert numbers([1.0, 1.0], [0.5, 0.5]) == [0.5, None, None]
    assert numbers([1.0], [0.5]) == [0.5, None, None]
    assert numbers([], []) == [None] * 3
    assert numbers([1.0, math.nan, 2.0], [0.5, 0.5, 0.5]) == [None] * 3
    assert numbers([1.0, 1.5], [0.5, math.nan]) == [None] * 3


def keep(folder, study, course, *, diverged=(), missing=()):
    """Write a made-up run: `course(replica)` gives the final accuracies of the three splits."""
    with Ledger.write(folder, study) as ledger:
        ledger.begin_session(workers=1)
        for replica in study.replicas:
            if replica in missing:
                continue
            for epoch in range(1, study.epochs + 1):
                values = {}
                splits = ("train", "validation", "test")
                for split, final in zip(splits, course(replica), strict=True):
                    if split != "validation" or study.validation:
                        accuracy = final if epoch == study.epochs else 0.5
                        values[split, "accuracy"] = accuracy
                        values[split, "loss"] = 1 - accuracy
                ledger.add(Measurement(replica, 100 * epoch, epoch, values), seconds=epoch)
            status = "diverged" if replica in diverged else "done"
            ledger.add(Outcome(replica, status, 100 * study.epochs, 1.0), seconds=10.0)
    return Comparison(folder)


STUDY = Study(arms=["plain", "batch"], lr=[0.1, 0.001, 0.01], seeds=6, epochs=2)
FINALS = {  # Test accuracy by arm and rate.
    "plain": {0.001: 0.92, 0.01: 0.95, 0.1: 0.60},
    "batch": {0.001: 0.965, 0.01: 0.97, 0.1: 0.961},
}


def usual(replica):
    final = FINALS[replica.arm][replica.lr] + 0.001 * replica.seed
    return final + 0.02, final + 0.01, final


def row(frame, **where):
    (found,) = frame[(frame[list(where)] == pd.Series(where)).all(axis=1)].to_dict("records")
    return found


def test_accuracy_by_rate_is_the_final_one_with_a_t_interval(tmp_path):
    frame = keep(tmp_path, STUDY, usual).sensitivity()
    assert list(frame.columns) == [
        *("arm", "lr", "weight_decay", "split", "n", "diverged", "mean", "low", "high")
    ]
    rates = frame[(frame["arm"] == "batch") & (frame["split"] == "test")]["lr"]
    assert list(rates) == [0.001, 0.01, 0.1]
    assert len(frame) == 2 * 3 * 3
    found = row(frame, arm="plain", lr=0.1, split="validation")
    finals = 0.61 + 0.001 * np.arange(6)
    half = T_5 * finals.std(ddof=1) / math.sqrt(6)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (finals.mean(), finals.mean() - half, finals.mean() + half)
    )
    assert (found["n"], found["diverged"], found["weight_decay"]) == (6, 0, 0.0)
    assert row(frame, arm="batch", lr=0.01, split="train")["mean"] == pytest.approx(0.9925)
    assert frame.attrs["band"] == "pointwise 95% t interval of the mean"


def test_the_ranges_of_a_study(tmp_path):
    ranges = keep(tmp_path, STUDY, usual).ranges()
    assert list(ranges["arm"]) == ["plain", "batch"]
    plain, batch = ranges.to_dict("records")
    assert (plain["best_lr"], plain["low"], plain["high"]) == (0.01, 0.01, 0.01)
    assert (plain["decades"], plain["open_low"], plain["open_high"]) == (0, False, False)
    assert plain["best"] == pytest.approx(0.9525)
    assert math.isnan(plain["difference"])
    assert (batch["best_lr"], batch["low"], batch["high"]) == (0.01, 0.001, 0.1)
    assert (batch["decades"], batch["open_low"], batch["open_high"]) == (2, True, True)
    assert (batch["n"], batch["own_decades"], batch["without"]) == (6, 2, 0)
    # Every seed has the same difference, so there is no interval.
    assert batch["difference"] == pytest.approx(2)
    assert math.isnan(batch["difference_low"])
    assert (batch["reported_lr"], batch["reported_weight_decay"]) == (0.01, 0.0)


def test_the_difference_of_ranges_has_the_paired_t_interval(tmp_path):
    def course(replica):
        final = FINALS[replica.arm][replica.lr]
        if replica[:2] == ("batch", 0.1) and replica.seed < 2:
            final = 0.8  # Two seeds' own ranges are a decade narrower.
        return final, final, final

    batch = keep(tmp_path, STUDY, course).ranges().iloc[1]
    differences = np.array([1.0, 1, 2, 2, 2, 2])
    half = T_5 * differences.std(ddof=1) / math.sqrt(6)
    expected = (10 / 6, 10 / 6 - half, 10 / 6 + half)
    found = batch[["difference", "difference_low", "difference_high"]]
    assert list(found) == pytest.approx(expected)
    assert batch["own_decades"] == pytest.approx(10 / 6)
    # The mean at 0.1 is (2·0.8 + 4·0.961) / 6, far below: the range of the means is another.
    assert batch["decades"] == pytest.approx(1)
    narrow = keep(tmp_path / "b", STUDY.with_fields({"confidence": 0.8}), course).ranges().iloc[1]
    assert batch["difference_low"] < narrow["difference_low"] < 10 / 6


def test_a_replica_that_diverged_counts_as_nothing_and_is_told(tmp_path):
    gone = [Replica("batch", 0.1, 4), *(Replica("plain", 0.1, seed) for seed in range(6))]
    comparison = keep(tmp_path, STUDY, usual, diverged=gone)
    frame = comparison.sensitivity()
    found = row(frame, arm="batch", lr=0.1, split="test")
    assert (found["n"], found["diverged"]) == (6, 1)
    assert found["mean"] == pytest.approx((5 * 0.961 + 0.011) / 6)
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    everything = row(frame, arm="plain", lr=0.1, split="test")
    assert (everything["mean"], everything["diverged"]) == (0, 6)
    assert not math.isnan(row(frame, arm="batch", lr=0.01, split="test")["low"])
    plain, batch = comparison.ranges().to_dict("records")
    assert (batch["low"], batch["high"], batch["open_high"]) == (0.001, 0.01, False)
    assert batch["own_decades"] == pytest.approx(11 / 6)
    assert plain["decades"] == 0


def test_an_arm_that_diverged_everywhere_has_no_range(tmp_path):
    gone = [replica for replica in STUDY.replicas if replica.arm == "batch"]
    comparison = keep(tmp_path, STUDY, usual, diverged=gone)
    batch = comparison.ranges().iloc[1]
    assert batch[["best_lr", "best", "low", "high", "decades", "difference"]].isna().all()
    assert (batch["open_low"], batch["open_high"], batch["without"]) == (False, False, 6)
    found = comparison.summary()["sensitivity"]["ranges"][1]
    assert (found["best"], found["without"], found["difference_low"]) == (None, 6, None)


def test_a_seed_that_diverged_everywhere_leaves_no_mean_difference(tmp_path):
    gone = [replica for replica in STUDY.replicas if replica[:1] == ("plain",) and not replica.seed]
    plain, batch = keep(tmp_path, STUDY, usual, diverged=gone).ranges().to_dict("records")
    assert (plain["without"], batch["without"]) == (1, 0)
    assert math.isnan(batch["difference"])
    # The mean of its rates has a range all the same, a sixth lower.
    assert plain["best"] == pytest.approx((5 * 0.95 + 0.015) / 6)


def test_of_several_decays_each_rate_has_its_best_by_the_other_seeds(tmp_path):
    study = STUDY.with_fields({"lr": [0.1, 0.2], "weight_decay": [0.01, 0.0], "seeds": 3})

    def course(replica):
        # On validation data the first rate does better with decay, and the second without.
        fits = (replica.lr == 0.1) == (replica.weight_decay == 0.01)
        validation = 0.9 if fits else 0.8
        if replica[1:] == (0.1, 2, 0.0):
            validation = 0.99  # Its own seed must not choose by it, and others do not by so little.
        # Test data would have chosen otherwise.
        return 0.9, validation, 0.85 if fits else 0.95

    comparison = keep(tmp_path, study, course)
    frame = comparison.sensitivity()
    assert [*zip(frame["lr"], frame["weight_decay"], strict=True)][:6:3] == [(0.1, 0.01), (0.2, 0)]
    assert set(frame[frame["split"] == "test"]["mean"].round(12)) == {0.85}
    assert len(frame) == 2 * 2 * 3
    batch = comparison.ranges().iloc[1]
    assert (batch["low"], batch["high"]) == (0.1, 0.2)
    assert (batch["reported_lr"], batch["reported_weight_decay"]) == (0.1, 0.01)


def test_seeds_that_differ_in_their_decay_show_the_one_that_most_have(tmp_path):
    study = STUDY.with_fields({"lr": [0.1, 0.2], "weight_decay": [0.0, 0.01], "seeds": 3})

    def course(replica):
        # Seed 0 alone does better without decay, by much: the two others choose by it.
        better = (0.99, 0.5) if replica.seed == 0 else (0.8, 0.9)
        return 0.9, better[replica.weight_decay > 0], 0.9 + 0.01 * (replica.weight_decay > 0)

    found = row(keep(tmp_path, study, course).sensitivity(), arm="plain", lr=0.1, split="test")
    assert found["weight_decay"] == 0
    assert found["mean"] == pytest.approx((0.91 + 0.9 + 0.9) / 3)


def test_one_arm_has_ranges_and_no_difference(tmp_path):
    comparison = keep(tmp_path, STUDY.with_fields({"arms": ["batch"]}), usual)
    (batch,) = comparison.ranges().to_dict("records")
    assert batch["decades"] == pytest.approx(2)
    assert math.isnan(batch["difference"])
    assert len(comparison.sensitivity()) == 3 * 3


def test_of_an_unfinished_study_the_finished_seeds_count(tmp_path):
    comparison = keep(tmp_path, STUDY, usual, missing=[Replica("batch", 0.1, 5)])
    assert set(comparison.sensitivity()["n"]) == {5}
    assert set(comparison.ranges()["n"]) == {5}
    nothing = keep(tmp_path / "nothing", STUDY, usual, missing=STUDY.replicas)
    assert (len(nothing.sensitivity()), len(nothing.ranges())) == (0, 0)
    assert nothing.summary()["sensitivity"] == {"within": 0.01, "rates": [], "ranges": []}


def test_one_rate_is_no_range(tmp_path):
    study = STUDY.with_fields({"lr": 0.01, "validation": 0, "seeds": 1})
    comparison = keep(tmp_path, study, usual)
    assert comparison.summary()["sensitivity"] is None
    frame = comparison.sensitivity()
    assert list(frame["split"]) == ["train", "test"] * 2
    assert frame["low"].isna().all()
    (plain, batch) = comparison.ranges().to_dict("records")
    assert (plain["decades"], plain["open_low"], plain["open_high"]) == (0, True, True)
    assert (batch["difference"], math.isnan(batch["difference_low"])) == (0, True)


def test_the_summary_has_what_the_frames_have(tmp_path):
    comparison = keep(tmp_path, STUDY, usual)
    summary = comparison.summary()["sensitivity"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["within"] == 0.01
    assert len(summary["rates"]) == len(comparison.sensitivity())
    plain, batch = summary["ranges"]
    assert plain["difference"] is None
    assert (batch["open_low"], batch["low"], batch["decades"]) == (True, 0.001, 2)


CURVES = {  # True mean accuracy at six rates, of two arms.
    "steep": ([0.93, 0.945, 0.95, 0.952, 0.93, 0.8], [0.94, 0.955, 0.965, 0.967, 0.965, 0.95]),
    "at the edge": ([0.93, 0.942, 0.95, 0.952, 0.93, 0.8], [0.94, 0.957, 0.965, 0.967, 0.957, 0.9]),
    "alike": ([0.93, 0.941, 0.948, 0.95, 0.941, 0.92], [0.93, 0.941, 0.948, 0.95, 0.941, 0.92]),
}


@pytest.mark.slow
@pytest.mark.parametrize("diverging", [0.0, 0.05])
@pytest.mark.parametrize("deviation", [0.002, 0.006])
@pytest.mark.parametrize("seeds", [5, 10, 20])
@pytest.mark.parametrize("case", CURVES)
def test_the_interval_covers_the_difference_of_ranges(case, seeds, deviation, diverging):
    rates = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]
    rng = np.random.default_rng(0)

    def differences(n):
        shared = rng.normal(0, 0.0015, (n, 1))  # What a seed does to both arms.
        widths = []
        for curve in CURVES[case]:
            accuracies = curve + shared + rng.normal(0, deviation, (n, 6))
            gone = rng.random((n, 6)) < diverging * np.array([0, 0, 0, 0.2, 1, 2])
            widths.append(own_decades(rates, np.where(gone, 0, accuracies)))
        return widths[0] - widths[1]

    truth = differences(20_000).mean()
    studies = differences(1000 * seeds).reshape(1000, seeds)
    found = [range_difference(one, np.zeros(seeds)) for one in studies]
    # Where all seeds agree there is no interval, and nothing is said.
    covered = [one.low <= truth <= one.high for one in found if not math.isnan(one.low)]
    assert len(covered) > 500
    assert np.mean(covered) > 0.92
