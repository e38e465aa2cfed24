import json
import math

import numpy as np
import pytest

from normlab.errors import InputError
from normlab.study import Comparison, Study
from normlab.study.ledger import Ledger
from normlab.training import Choice, Engine, Measurement, Outcome, Replica, Setting

BASE = Study(arms=["plain", "batch"], seeds=6, epochs=3)


def keep(folder, study, course, *, diverged=(), missing=()):
    """Write a made-up run: `course(replica, epoch)` gives the accuracies of the three splits."""
    with Ledger.write(folder, study) as ledger:
        ledger.begin_session(workers=1)
        for replica in study.replicas:
            if replica in missing:
                continue
            epochs = 1 if replica in diverged else study.epochs
            for epoch in range(1, epochs + 1):
                values = {}
                splits = ("train", "validation", "test")
                for split, accuracy in zip(splits, course(replica, epoch), strict=True):
                    if split != "validation" or study.validation:
                        values[split, "accuracy"] = accuracy
                        values[split, "loss"] = 1 - accuracy
                ledger.add(Measurement(replica, 100 * epoch, epoch, values), seconds=epoch)
            status = "diverged" if replica in diverged else "done"
            ledger.add(Outcome(replica, status, 100 * epochs, 1.0), seconds=10.0)
    return Comparison(folder)


def rising(replica, epoch):
    accuracy = 0.90 + 0.02 * epoch + 0.001 * replica.seed + 0.015 * (replica.arm == "batch")
    return accuracy, accuracy - 0.001, accuracy - 0.002


def by_name(comparison, name, arm="batch"):
    (one,) = (v for v in comparison.verdicts if (v.metric.name, v.arm) == (name, arm))
    return one


def test_the_frame_is_tidy_and_whole(tmp_path):
    frame = keep(tmp_path, BASE, rising).frame()
    columns = [
        "arm",
        "lr",
        "seed",
        "weight_decay",
        "step",
        "epoch",
        "split",
        "metric",
        "value",
        "time",
        "status",
    ]
    assert list(frame.columns) == columns
    assert len(frame) == 2 * 6 * 3 * 3 * 2
    assert set(frame["status"]) == {"done"}
    row = frame.query("arm == 'batch' and seed == 2 and epoch == 3 and split == 'test'")
    assert row.set_index("metric")["value"].to_dict() == pytest.approx(
        {"accuracy": 0.975, "loss": 0.025}
    )


def test_what_is_still_running_says_so(tmp_path):
    with Ledger.write(tmp_path, BASE) as ledger:
        ledger.begin_session(workers=1)
        values = {("test", "accuracy"): 0.5}
        ledger.add(Measurement(BASE.replicas[0], 100, 1, values), seconds=1.0)
    assert set(Comparison(tmp_path).frame()["status"]) == {"running"}


def test_curves_are_means_with_pointwise_t_intervals(tmp_path):
    comparison = keep(tmp_path, BASE, rising)
    curves = comparison.curves("accuracy")
    assert "pointwise 95% t interval" in curves.attrs["band"]
    point = curves.query("arm == 'plain' and split == 'train' and epoch == 2").iloc[0]
    accuracies = 0.94 + 0.001 * np.arange(6)
    half = 2.570581835636314 * accuracies.std(ddof=1) / math.sqrt(6)
    assert (point["mean"], point["low"], point["high"]) == pytest.approx(
        (accuracies.mean(), accuracies.mean() - half, accuracies.mean() + half)
    )
    assert (point["n"], point["step"], point["diverged"]) == (6, 200, 0)
    assert len(curves) == 2 * 3 * 3


def test_curves_of_what_was_not_measured_are_refused(tmp_path):
    with pytest.raises(InputError, match="'speed' was not measured: known are accuracy, loss"):
        keep(tmp_path, BASE, rising).curves("speed")


def test_the_outcomes_are_the_last_the_best_and_the_first(tmp_path):
    def course(replica, epoch):
        validation = [0.91, 0.97, 0.96][epoch - 1]
        test = [0.93, 0.951, 0.962][epoch - 1] + 0.001 * replica.seed
        return 0.99, validation, test

    row = keep(tmp_path, BASE, course).outcomes().loc[("batch", 3)]
    assert row["final_test_accuracy"] == pytest.approx(0.965)
    assert row["final_test_loss"] == pytest.approx(0.035)
    assert row["best_validation_test_accuracy"] == pytest.approx(0.954)
    assert row["steps_to_target"] == 200


def test_the_first_of_equally_good_validation_epochs_is_the_best(tmp_path):
    row = keep(tmp_path, BASE, lambda _, epoch: (0.9, 0.95, 0.9 + 0.01 * epoch)).outcomes()
    assert row.loc[("plain", 0), "best_validation_test_accuracy"] == pytest.approx(0.91)


def test_a_target_that_is_never_reached_has_no_step(tmp_path):
    comparison = keep(tmp_path, BASE, lambda r, _: (0.9, 0.9, 0.96 if r.arm == "batch" else 0.94))
    one = by_name(comparison, "steps_to_target")
    assert (one.failed, one.difference, one.verdict) == ((0, 6), None, "better")
    assert "0 of 6 replicas of batch and 6 of plain diverged or did not reach 95%" in one.reason
    summary = comparison.summary()["arms"]["plain"]["steps_to_target"]
    assert summary == {"mean": None, "sd": None, "n": 0, "failed": 6, "diverged": 0}


def test_verdicts_are_about_the_paired_differences(tmp_path):
    comparison = keep(tmp_path, BASE, rising)
    one = by_name(comparison, "final_test_accuracy")
    assert one.difference == pytest.approx(0.015)
    assert (one.verdict, one.n, one.correlation) == ("better", 6, pytest.approx(1))
    loss = by_name(comparison, "final_test_loss")
    assert loss.difference == pytest.approx(-0.015)
    assert loss.verdict == "equivalent"  # Its margin is 0.02.
    assert [v.metric.name for v in comparison.verdicts] == [m.name for m in comparison.metrics]


def test_a_diverged_run_counts_and_its_early_numbers_do_not(tmp_path):
    gone = [replica for replica in BASE.replicas if replica.arm == "batch" and replica.seed == 2]
    comparison = keep(tmp_path, BASE, rising, diverged=gone)
    summary = comparison.summary()["arms"]["batch"]["final_test_accuracy"]
    assert (summary["n"], summary["failed"], summary["diverged"]) == (5, 1, 1)
    assert by_name(comparison, "final_test_accuracy").failed == (1, 0)
    curves = comparison.curves().query("arm == 'batch'")
    assert set(curves["n"]) == {5}
    assert set(curves["diverged"]) == {1}


def test_without_validation_data_there_is_no_best_validation_epoch(tmp_path):
    study = BASE.with_fields({"validation": 0})
    comparison = keep(tmp_path, study, rising)
    names = [metric.name for metric in comparison.metrics]
    assert names == ["final_test_accuracy", "final_test_loss", "steps_to_target"]
    assert by_name(comparison, "final_test_accuracy").verdict == "better"


def test_an_unfinished_study_gets_no_verdict(tmp_path):
    comparison = keep(tmp_path, BASE, rising, missing=BASE.replicas[-1:])
    assert not comparison.complete
    for one in comparison.verdicts:
        assert one.verdict is None
        assert one.reason == (
            "no verdict before the study is complete: 11 of 12 replicas are done, and 5 of 6 seeds "
            "in every arm, on which the numbers rest"
        )
        assert (one.p, one.p_holm, one.p_sign_flip, one.p_equivalence) == (None,) * 4
    assert by_name(comparison, "final_test_accuracy").n == 5


def test_a_study_with_nothing_done_yet_can_be_read(tmp_path):
    comparison = keep(tmp_path, BASE, rising, missing=BASE.replicas)
    assert len(comparison.frame()) == len(comparison.curves()) == len(comparison.outcomes()) == 0
    assert {one.verdict for one in comparison.verdicts} == {None}
    assert comparison.verdicts[0].reason.endswith(
        "0 of 12 replicas are done, and no seed yet in every arm"
    )
    json.dumps(comparison.summary(), allow_nan=False)


def test_one_arm_alone_has_numbers_and_no_verdicts(tmp_path):
    comparison = keep(tmp_path, BASE.with_fields({"arms": ["batch"]}), rising)
    assert comparison.verdicts == []
    assert comparison.summary()["arms"]["batch"]["final_test_accuracy"]["n"] == 6


RATES = BASE.with_fields({"lr": [0.1, 0.2, 0.4]})


def test_a_seeds_rate_is_chosen_by_the_other_seeds_on_validation_data(tmp_path):
    def course(replica, _):
        # On test data 0.4 is best; on validation data 0.2 is, but for seed 0, which would pull
        # the average of all toward 0.1.
        validation = {0.1: 0.90, 0.2: 0.92, 0.4: 0.85}[replica.lr]
        if replica.seed == 0:
            validation = {0.1: 0.99, 0.2: 0.80, 0.4: 0.80}[replica.lr]
        return 0.9, validation, {0.1: 0.93, 0.2: 0.94, 0.4: 0.96}[replica.lr]

    comparison = keep(tmp_path, RATES, course)
    rates = {seed: setting.lr for seed, setting in comparison.chosen["batch"].items()}
    assert rates == {0: 0.2, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.1}
    assert comparison.reported == {"plain": Setting(0.1), "batch": Setting(0.1)}
    assert comparison.outcomes().loc[("batch", 0), "final_test_accuracy"] == 0.94
    assert comparison.summary()["chosen"]["batch"]["0"] == {"lr": 0.2, "weight_decay": 0.0}


def test_a_weight_decay_is_chosen_along_with_the_rate(tmp_path):
    study = BASE.with_fields({"lr": [0.1, 0.2], "weight_decay": [0.0, 0.01]})

    def course(replica, _):
        best = Setting(0.1, 0.01) if replica.arm == "plain" else Setting(0.2, 0.0)
        accuracy = 0.95 if replica.setting == best else 0.9
        return 0.9, accuracy, accuracy - 0.01

    comparison = keep(tmp_path, study, course)
    assert comparison.complete
    assert comparison.reported == {"plain": Setting(0.1, 0.01), "batch": Setting(0.2, 0.0)}
    assert str(comparison.reported["plain"]) == "lr 0.1, weight decay 0.01"
    outcomes = comparison.outcomes()
    assert set(outcomes["final_test_accuracy"]) == {0.94}
    assert outcomes.loc[("plain", 3), "weight_decay"] == 0.01
    curves = comparison.curves()
    assert len(curves) == 2 * 2 * 2 * 3 * study.epochs
    assert set(curves["n"]) == {6}


def test_a_rate_at_which_runs_diverge_is_not_chosen(tmp_path):
    def course(replica, _):
        return 0.9, {0.1: 0.90, 0.2: 0.91, 0.4: 0.99}[replica.lr], 0.95

    fast = [replica for replica in RATES.replicas if replica.lr == 0.4]
    comparison = keep(tmp_path, RATES, course, diverged=fast)
    assert set(comparison.chosen["plain"].values()) == {Setting(0.2)}
    assert comparison.summary()["arms"]["plain"]["final_test_accuracy"]["diverged"] == 0


def test_choosing_among_equal_rates_finds_no_difference_that_is_not_there(tmp_path):
    """Ten equal rates: the best of ten must not look better than it is."""
    rng = np.random.default_rng(0)
    study = BASE.with_fields({"lr": [0.1 * k for k in range(1, 11)], "seeds": 10, "epochs": 1})
    excess, wrong = [], 0
    for trial in range(40):
        folder = tmp_path / str(trial)
        comparison = keep(folder, study, lambda *_: [rng.normal(0.95, 0.003)] * 3)
        accuracies = comparison.outcomes()["final_test_accuracy"]
        excess.append((accuracies.mean() - 0.95) / 0.003)
        wrong += by_name(comparison, "final_test_accuracy").verdict in ("better", "worse")
    assert abs(np.mean(excess)) < 4 / math.sqrt(40 * 20)
    assert wrong <= 5


def test_seconds_are_those_of_all_sessions(tmp_path):
    keep(tmp_path, BASE, rising, missing=BASE.replicas[6:])
    with Ledger.write(tmp_path, BASE) as ledger:
        ledger.begin_session(workers=2)
        for replica in BASE.replicas[6:]:
            ledger.add(Outcome(replica, "diverged", 0, 1.0), seconds=7.5)
    assert Comparison(tmp_path).seconds == 17.5


def test_a_folder_without_a_ledger_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Comparison(tmp_path)


def test_the_summary_has_what_programs_were_promised(tmp_path):
    summary = keep(tmp_path, BASE, rising).summary()
    assert {"study", "run", "seconds", "arms", "verdicts"} <= set(summary)
    assert {
        "metric", "arm", "baseline", "difference", "interval", "confidence", "p", "p_holm",
        "effect_size", "share_improved", "correlation", "equivalence_margin", "verdict",
        "seeds_needed",
    } <= set(summary["verdicts"][0])  # fmt: skip
    assert Study.make(summary["study"]) == BASE
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_replicas_have_what_each_ended_with_at_every_rate(tmp_path):
    study = BASE.with_fields({"lr": [0.1, 0.01], "seeds": 2})
    bad, absent = study.replicas[0], study.replicas[-1]
    keep(tmp_path, study, rising, diverged=[bad], missing=[absent])
    with Ledger.write(tmp_path, study) as ledger:
        ledger.begin_session(workers=1)
        ledger.add(Choice("batch", Engine("looped", "traced"), {}), seconds=0.0)
    table = Comparison(tmp_path).replicas()
    assert len(table) == len(study.replicas) - 1
    rows = table.set_index(["arm", "lr", "seed", "weight_decay"]).to_dict("index")
    assert absent not in rows
    assert (rows[bad]["status"], rows[bad]["step"], rows[bad]["seconds"]) == ("diverged", 100, 1.0)
    assert math.isnan(rows[bad]["final_test_accuracy"])
    assert math.isnan(rows[bad]["engine"])  # None was chosen for its arm.
    other = rows["batch", 0.1, 1, 0.0]
    assert (other["status"], other["step"], other["engine"]) == ("done", 300, "looped, traced")
    _, validation, test = rising(Replica("batch", 0.1, 1), 3)
    assert (other["final_validation_accuracy"], other["final_test_accuracy"]) == (validation, test)
