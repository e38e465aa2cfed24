from dataclasses import replace

import pytest

from normlab.report import headline, remarks, sentence
from normlab.report.wording import difference, duration, interval, mean_and_sd, word
from normlab.study import Metric, judge
from normlab.training import Replica

ACCURACY = Metric("final_test_accuracy", "final test accuracy", True, 0.005, "points")
LOSS = Metric("final_test_loss", "final test loss", False, 0.02, "nats")
STEPS = Metric(
    "steps_to_target", "steps to 95% test accuracy", False, None, "steps", "did not reach 95%"
)


SPREAD = [0.0, 0.001, 0.002, 0.003, 0.004]


def verdict(word, metric=ACCURACY, **fields):
    (one,) = judge(metric, {"plain": SPREAD, "batch": SPREAD[::-1]}, "plain")
    usual = {"n": 10, "difference": 0.0182, "interval": (0.01504, 0.02146)}
    usual |= {"verdict": word, "reason": "", "seeds_needed": 0}
    return replace(one, **{**usual, **fields})


FAILED = {
    "difference": None,
    "interval": None,
    "failed": (1, 0),
    "reason": "1 of 10 replicas of batch and 0 of plain diverged, so the sign test decides and "
    "there "
    "is no mean difference",
}
SENTENCES = [
    (
        verdict("better"),
        "batch is better than plain on final test accuracy: +1.82 points "
        "(95% interval +1.50 to +2.15; 10 seeds).",
    ),
    (
        verdict("worse", difference=-0.0182, interval=(-0.02146, -0.01504), n=7),
        "batch is worse than plain on final test accuracy: −1.82 points "
        "(95% interval −2.15 to −1.50; 7 seeds).",
    ),
    (
        verdict("better", LOSS, difference=-0.10327, interval=(-0.11641, -0.09006)),
        "batch is better than plain on final test loss: −0.1033 nats "
        "(95% interval −0.1164 to −0.0901; 10 seeds).",
    ),
    (
        verdict("better", STEPS, difference=-7215.6, interval=(-9206.4, -5224.8)),
        "batch is better than plain on steps to 95% test accuracy: −7,216 steps "
        "(95% interval −9,206 to −5,225; 10 seeds).",
    ),
    (
        verdict("equivalent", difference=0.0004, interval=(-0.0006, 0.0014)),
        "batch and plain are equivalent on final test accuracy, within ±0.50 points: +0.04 points "
        "(95% interval −0.06 to +0.14; 10 seeds).",
    ),
    (
        verdict(
            "equivalent",
            LOSS,
            difference=0.0004,
            interval=(0.0001, 0.0007),
            reason="a difference is there, and it is inside the margin",
        ),
        "batch and plain are equivalent on final test loss, within ±0.0200 nats: +0.0004 nats "
        "(95% interval +0.0001 to +0.0007; 10 seeds); "
        "a difference is there, and it is inside the margin.",
    ),
    (
        verdict("inconclusive", difference=0.003, interval=(-0.001, 0.007), seeds_needed=12),
        "Whether batch differs from plain on final test accuracy is inconclusive: +0.30 points "
        "(95% interval −0.10 to +0.70; 10 seeds); a new study with about 22 seeds would decide it.",
    ),
    (
        verdict("inconclusive", difference=0.003, interval=(-0.001, 0.007), seeds_needed=1),
        "Whether batch differs from plain on final test accuracy is inconclusive: +0.30 points "
        "(95% interval −0.10 to +0.70; 10 seeds); a new study with about 11 seeds would decide it.",
    ),
    (
        verdict("inconclusive", difference=0.003, interval=(-0.001, 0.007), seeds_needed=None),
        "Whether batch differs from plain on final test accuracy is inconclusive: +0.30 points "
        "(95% interval −0.10 to +0.70; 10 seeds); if things are as they look, "
        "no study of up to 1,000 seeds would decide it.",
    ),
    (
        verdict("better", **FAILED),
        "batch is better than plain on final test accuracy; 1 of 10 replicas of batch and 0 of "
        "plain diverged, so the sign test decides and there is no mean difference.",
    ),
    (
        verdict("inconclusive", seeds_needed=None, **FAILED),
        "Whether batch differs from plain on final test accuracy is inconclusive; if things are "
        "as they look, no study of up to 1,000 seeds would decide it; 1 of 10 replicas of batch "
        "and 0 of plain diverged, so the "
        "sign test decides and there is no mean difference.",
    ),
    (
        verdict(None, n=1, interval=None, reason="no verdict from 1 seed: at least 5 are needed"),
        "batch against plain on final test accuracy: +1.82 points; "
        "no verdict from 1 seed: at least 5 are needed.",
    ),
    (
        verdict(None, n=4, reason="no verdict from 4 seeds: at least 5 are needed"),
        "batch against plain on final test accuracy: +1.82 points "
        "(95% interval +1.50 to +2.15; 4 seeds); no verdict from 4 seeds: at least 5 are needed.",
    ),
    (
        verdict(None, n=0, difference=None, interval=None, reason="no verdict before the study"),
        "batch against plain on final test accuracy; no verdict before the study.",
    ),
]


@pytest.mark.parametrize(("one", "expected"), SENTENCES)
def test_each_verdict_has_its_sentence(one, expected):
    assert sentence(one) == expected


@pytest.mark.parametrize(
    ("confidence", "expected"), [(0.95, "95%"), (0.9, "90%"), (0.975, "97.5%"), (0.999, "99.9%")]
)
def test_a_sentence_names_the_confidence_that_was_declared(confidence, expected):
    assert f"({expected} interval" in sentence(verdict("better", confidence=confidence))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (verdict("better"), "better"),
        (verdict("worse"), "worse"),
        (verdict("equivalent"), "equivalent"),
        (verdict("inconclusive", seeds_needed=12), "inconclusive"),
        (verdict(None), "no verdict"),
    ],
)
def test_each_verdict_has_its_word(one, expected):
    assert word(one) == expected


def test_a_difference_comes_with_and_without_its_unit():
    assert difference(verdict("better")) == "+1.82 points"
    assert difference(verdict("better"), unit=False) == "+1.82"
    assert difference(verdict("worse", LOSS, difference=-0.02)) == "−0.0200 nats"
    assert difference(verdict("better", difference=None)) == ""


def test_an_interval_has_two_signed_ends():
    assert interval(verdict("inconclusive", interval=(-0.001, 0.007))) == "−0.10 to +0.70"
    assert interval(verdict("better", interval=None)) == ""


@pytest.mark.parametrize(
    ("metric", "mean", "sd", "failed", "expected"),
    [
        (ACCURACY, 0.95427, 0.00391, 0, "95.43% ± 0.39"),
        (ACCURACY, 1.0, 0.0, 0, "100.00% ± 0.00"),
        (LOSS, 0.19331, 0.01456, 0, "0.1933 ± 0.0146"),
        (STEPS, 8933.6, 2781.5, 2, "8,934 ± 2,782 (2 failed)"),
        (ACCURACY, 0.95427, None, 0, "95.43%"),
        (STEPS, 8933.6, None, 5, "8,934 (5 failed)"),
        (ACCURACY, None, None, 0, "–"),
        (ACCURACY, None, None, 6, "– (6 failed)"),
    ],
)
def test_a_mean_goes_with_its_deviation_and_with_what_is_not_in_it(
    metric, mean, sd, failed, expected
):
    assert mean_and_sd(metric, {"mean": mean, "sd": sd, "failed": failed}) == expected


def test_the_answer_has_a_sentence_for_each_arm_on_the_first_metric(compared):
    comparison = compared(arms=["plain", "batch", "group:8"])
    first, second = headline(comparison)
    assert first.startswith("batch is better than plain on final test accuracy: +2.")
    assert second.startswith("group:8 is worse than plain on final test accuracy: −2.")
    assert [first, second] == [sentence(one) for one in comparison.verdicts[:2]]


def test_one_arm_is_not_an_answer(compared):
    comparison = compared(arms=["batch"], seeds=2)
    finals = comparison.outcomes()["final_test_accuracy"] * 100
    size = f"{finals.mean():.2f}% ± {finals.std():.2f} over 2 seeds"
    expected = f"batch ran alone, with final test accuracy {size}: a second arm would make a "
    assert headline(comparison) == [expected + "comparison."]
    begun = compared(arms=["batch"], seeds=2, running=lambda _: True)
    alone = "batch ran alone: a second arm would make a comparison."
    assert headline(begun) == [alone, "0 of 2 replicas are done."]


def test_without_a_verdict_replicas_that_failed_are_told(compared):
    (told,) = headline(compared(seeds=3, diverged=lambda replica: replica.seed > 0))
    assert told == (
        "batch against plain on final test accuracy; 2 of 3 replicas of batch and 2 of plain "
        "diverged; no verdict from 3 seeds: at least 5 are needed."
    )


def test_what_does_not_speak_for_itself_on_another_metric_gets_a_sentence(compared):
    comparison = compared(
        arms=["plain", "batch", "layer"],
        diverged=lambda replica: replica == Replica("layer", 0.01, 2),
    )
    told = remarks(comparison)
    others = [one for one in comparison.verdicts if one.metric.name != "final_test_accuracy"]
    assert told == [sentence(one) for one in others if one.arm == "layer" or any(one.failed)]
    assert len(told) == 4
    assert "Whether layer differs from plain on final test loss is inconclusive" in told[0]


def test_where_nothing_is_known_there_are_no_remarks(compared):
    assert remarks(compared(missing=lambda _: True)) == []


def test_an_incomplete_study_has_no_verdict_and_says_so(compared):
    (text,) = headline(compared(missing=lambda replica: replica.seed == 5))
    assert text.startswith("batch against plain on final test accuracy: +1.98 points")
    assert text.endswith(
        "no verdict before the study is complete: 10 of 12 replicas are done, and 5 of 6 seeds in "
        "every arm, on which the numbers rest."
    )


def test_one_arm_that_is_not_done_says_how_far_it_is(compared):
    one = compared(arms=["plain"], missing=lambda replica: replica.seed > 3)
    assert headline(one)[1:] == ["4 of 6 replicas are done."]
    assert len(headline(compared(arms=["plain"]))) == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (9.6, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7384, "2 h 3 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_a_duration_reads_as_people_say_it(seconds, expected):
    assert duration(seconds) == expected


def test_before_anything_is_measured_the_answer_is_how_far_it_is(compared):
    nothing = compared(missing=lambda _: True)
    assert headline(nothing) == ["No measurements yet; 0 of 12 replicas done."]
