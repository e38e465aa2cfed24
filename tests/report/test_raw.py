import json

import pandas as pd
import pytest

from normlab.report.raw import raw

KEYS = ["arm", "lr", "seed", "weight_decay", "step", "epoch", "split", "metric", "value", "status"]


def unrolled(courses):
    """The measurements, one a row."""
    return pd.DataFrame(
        {
            **{key: course[key] for key in ("arm", "lr", "seed", "weight_decay", "status")},
            **{key: course[key][i] for key in ("step", "epoch", "time")},
            **{key: one[key] for key in ("split", "metric")},
            "value": one["value"][i],
        }
        for course in courses
        for one in course["values"]
        for i in range(len(course["step"]))
        if one["value"][i] is not None
    )


def test_every_measurement_is_there_to_the_last_bit(compared):
    comparison = compared(
        evaluate_every=30, seeds=3, diverged=lambda replica: replica == ("batch", 0.01, 2, 0.0)
    )
    made = json.loads(json.dumps(raw(comparison, name="a", room=10**7), allow_nan=False))
    assert (made["run"], made["per_epoch"], made["left_out"]) == ("a", 100, 0)
    frame = comparison.frame()
    ours = unrolled(made["courses"])
    order = KEYS[:8]
    frame = frame.sort_values(order).reset_index(drop=True)
    ours = ours.sort_values(order).reset_index(drop=True)
    assert ours[KEYS].to_dict("records") == frame[KEYS].to_dict("records")
    seconds = (frame["time"] - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    assert list(ours["time"]) == pytest.approx(list(seconds), abs=1e-6)
    assert {course["status"] for course in made["courses"]} == {"done", "diverged"}


def test_outcomes_are_those_of_the_export(compared):
    comparison = compared(seeds=2, diverged=lambda replica: replica.seed == 1)
    ends = comparison.replicas()
    made = raw(comparison, name="a", room=10**7)["replicas"]
    assert list(made) == list(ends.columns)
    expected = [[None if x != x else x for x in ends[key].astype(object)] for key in ends]
    assert [[None if x is None else x for x in made[key]] for key in made] == expected


def test_a_course_knows_whether_it_is_reported_and_how_long_a_step_took(compared):
    comparison = compared(lr=[0.001, 0.01], seeds=3, running=lambda one: one.seed == 2)
    courses = raw(comparison, name="a", room=10**7)["courses"]
    assert {(one["lr"], one["reported"]) for one in courses} == {(0.001, False), (0.01, True)}
    # Those that run have the pace of those that ended: 3 seconds, 400 steps.
    assert {one["status"] for one in courses} == {"done", "running"}
    assert {one["pace"] for one in courses} == {3 / 400}
    for row in comparison._replicas:
        row["seconds"] = 4.0 * (1 + row["seed"])
    again = raw(comparison, name="a", room=10**7)["courses"]
    # Its own, or the mean of its arm.
    for one in again:
        assert one["pace"] == pytest.approx([0.01, 0.02, 0.015][one["seed"]])


def test_what_does_not_fit_is_left_out_and_counted(compared):
    comparison = compared(lr=[0.001, 0.01], seeds=2)
    all_ = raw(comparison, name="a", room=10**7)
    assert len(all_["courses"]) == 8
    size = len(json.dumps(all_, separators=(",", ":")))
    some = raw(comparison, name="a", room=size - 500)
    assert {one["lr"] for one in some["courses"]} == {0.01}
    assert some["left_out"] == 4
    none = raw(comparison, name="a", room=0)
    assert (none["courses"], none["left_out"]) == ([], 8)


def test_before_anything_is_measured_there_is_nothing(compared):
    made = raw(compared(missing=lambda _: True), name="a", room=10**7)
    assert (made["courses"], made["left_out"], made["per_epoch"]) == ([], 0, 0)
