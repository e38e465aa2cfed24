"""From ledgers to rows, and from rows to numbers; with runs that are made up."""

import math

import pandas as pd
import pytest

from normlab.claims import Row
from normlab.claims.effects import points
from normlab.claims.outcomes import course, ends
from normlab.claims.setups import alone
from normlab.study import Comparison, Study, run
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Replica

STUDY = Study(arms=["plain", "batch"], lr=[0.1, 0.2], seeds=5, epochs=2)
DIVERGED = {Replica("plain", lr, 3) for lr in STUDY.lr}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Plain is better at 0.1 and batch at 0.2; seed 3 of plain diverges in its second epoch."""
    folder = tmp_path_factory.mktemp("made-up")
    with Ledger.write(folder, STUDY) as ledger:
        ledger.begin_session(workers=1)
        for replica in STUDY.replicas:
            good = replica.lr == (0.1 if replica.arm == "plain" else 0.2)
            epochs = 1 if replica in DIVERGED else 2
            for epoch in range(1, epochs + 1):
                value = 0.5 + 0.2 * good + 0.1 * epoch + 0.001 * replica.seed
                values = {
                    (split, metric): value
                    for split in ("train", "validation", "test")
                    for metric in ("accuracy", "loss")
                }
                ledger.add(Measurement(replica, 100 * epoch, epoch, values), seconds=1.0)
            status = "diverged" if replica in DIVERGED else "done"
            ledger.add(Outcome(replica, status, 100 * epochs, 1.0), seconds=1.0)
    return Comparison(folder)


def frame_of(rows_by_seed):
    rows = [(seed, *row) for seed, rows in rows_by_seed.items() for row in rows]
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_each_arm_ends_at_its_own_rate(comparison):
    rows = ends(comparison, {"final_test_accuracy": "accuracy", "steps_to_target": "steps"})
    assert sorted(rows) == [0, 1, 2, 3, 4]
    found = {(row.arm, row.quantity): row for row in rows[2]}
    assert found["plain", "accuracy"] == Row("plain", "accuracy", 0.1, pytest.approx(0.902))
    assert found["batch", "accuracy"] == Row("batch", "accuracy", 0.2, pytest.approx(0.902))
    assert math.isnan(found["batch", "steps"].value)


def test_one_that_diverged_has_no_number_and_stays(comparison):
    rows = ends(comparison, {"final_test_accuracy": "accuracy"})
    assert math.isnan({row.arm: row for row in rows[3]}["plain"].value)


def test_the_course_is_that_at_the_chosen_rate(comparison):
    rows = course(comparison, "test accuracy")
    of_plain = [row for row in rows[1] if row.arm == "plain"]
    assert of_plain == [
        Row("plain", "test accuracy", 100, pytest.approx(0.801)),
        Row("plain", "test accuracy", 200, pytest.approx(0.901)),
    ]
    assert [row.at for row in rows[3] if row.arm == "plain"] == [100]


def test_points_are_paired_and_a_failure_is_worst():
    nan = math.nan
    frame = frame_of(
        {
            seed: [Row("batch", "a", 0, batch), Row("plain", "a", 0, plain)]
            for seed, (batch, plain) in enumerate([(0.9, 0.8), (0.9, nan), (nan, 0.8), (nan, nan)])
        }
    ).sample(frac=1, random_state=0)  # The order of rows does not matter.
    ahead, only_plain, only_batch, both = points(frame, "a", "batch", "plain")
    assert (ahead, only_plain, only_batch) == (pytest.approx(10), math.inf, -math.inf)
    assert math.isnan(both)


def test_an_arm_alone_is_trained_as_it_is_beside_others(tmp_path):
    study = Study(
        network="mlp:8", arms=["plain", "batch+dropout:0.5"], validation=59_000, seeds=2, epochs=1
    )
    one = alone(study, "batch+dropout:0.5")
    for folder, declared in (("both", study), ("alone", one)):
        run(declared, tmp_path / folder, engine="looped")
    both = Comparison(tmp_path / "both").frame().query("arm != 'plain'")
    columns = ["arm", "lr", "seed", "step", "split", "metric", "value"]
    expected = both[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        Comparison(tmp_path / "alone").frame()[columns], expected, check_exact=True
    )
