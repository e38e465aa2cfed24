import numpy as np
import pytest

from normlab.study import Metric, judge, verdicts

ACCURACY = Metric("final_test_accuracy", "final test accuracy", True, 0.005, "points")
LOSS = Metric("final_test_loss", "final test loss", False, 0.02, "nats")
NAN = float("nan")


def verdict(metric, plain, batch, **options):
    (one,) = judge(metric, {"plain": plain, "batch": batch}, "plain", **options)
    return one


def around(mean, spread, n=10, seed=0):
    noise = np.random.default_rng(seed).normal(size=n)
    return mean + spread * (noise - noise.mean()) / noise.std(ddof=1)


def test_higher_accuracy_is_better_and_higher_loss_is_worse():
    low, high = around(0.94, 0.002), around(0.96, 0.002, seed=1)
    assert verdict(ACCURACY, low, high).verdict == "better"
    assert verdict(ACCURACY, high, low).verdict == "worse"
    assert verdict(LOSS, low, high).verdict == "worse"
    assert verdict(LOSS, high, low).verdict == "better"


def test_the_numbers_belong_to_the_differences():
    plain, batch = around(0.94, 0.002), around(0.96, 0.003, seed=1)
    one = verdict(ACCURACY, plain, batch)
    assert one.difference == pytest.approx(0.02)
    assert one.deviation == pytest.approx((batch - plain).std(ddof=1))
    assert one.effect_size == pytest.approx(one.difference / one.deviation)
    assert one.share_improved == 1
    assert one.correlation == pytest.approx(np.corrcoef(plain, batch)[0, 1])
    assert one.interval[0] < one.difference < one.interval[1]
    assert one.seeds_needed == 0


def test_a_difference_well_inside_the_margin_is_equivalent():
    one = verdict(ACCURACY, around(0.95, 0.001), around(0.95, 0.001, seed=1))
    assert (one.verdict, one.seeds_needed, one.reason) == ("equivalent", 0, "")


def test_a_real_difference_inside_the_margin_is_equivalent_and_says_so():
    plain = around(0.95, 0.001)
    one = verdict(ACCURACY, plain, plain + around(0.001, 0.0005, seed=1))
    assert one.p_holm < 0.05
    assert one.verdict == "equivalent"
    assert "inside the margin" in one.reason


def test_a_noisy_difference_is_inconclusive_and_says_what_it_would_take():
    one = verdict(ACCURACY, around(0.95, 0.01), around(0.953, 0.01, seed=1))
    assert one.verdict == "inconclusive"
    assert one.seeds_needed > 10


def test_with_no_margin_nothing_is_equivalent():
    steps = Metric("steps_to_target", "steps", False, None, "steps")
    one = verdict(steps, around(1000, 1), around(1000, 1, seed=1))
    assert (one.verdict, one.p_equivalence) == ("inconclusive", None)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_seeds_get_no_verdict(n):
    one = verdict(ACCURACY, np.linspace(0.90, 0.91, n), np.linspace(0.98, 0.99, n))
    assert one.verdict is None
    assert one.seeds_needed == 5 - n
    assert "at least 5 are needed" in one.reason


def test_identical_arms_are_equivalent():
    values = around(0.95, 0.01)
    one = verdict(ACCURACY, values, values.copy())
    assert (one.verdict, one.p, one.effect_size) == ("equivalent", 1, None)


def test_equal_differences_are_judged_by_their_signs_and_get_no_interval():
    steps = Metric("steps_to_target", "steps", False, None, "steps")
    few = verdict(steps, np.full(5, 3436.0), np.full(5, 1718.0))
    assert (few.verdict, few.p, few.difference) == ("inconclusive", 2 / 2**5, -1718)
    many = verdict(steps, np.full(6, 3436.0), np.full(6, 1718.0))
    assert (many.verdict, many.p, many.interval) == ("better", 2 / 2**6, None)
    assert "all differences are equal" in many.reason


def test_equal_arms_among_many_say_how_many_seeds_would_make_them_equivalent():
    plain = around(0.95, 0.01, n=5)
    others = {name: plain + around(0.02, 0.01, n=5, seed=i) for i, name in enumerate("abc")}
    same = judge(ACCURACY, {"plain": plain, "same": plain.copy(), **others}, "plain")[0]
    assert (same.verdict, same.difference) == ("inconclusive", 0)
    assert same.seeds_needed == 2  # 1/2⁷ is under 0.05/4.
    alone = verdict(ACCURACY, plain, plain.copy())
    assert (alone.verdict, alone.p_equivalence) == ("equivalent", 1 / 2**5)


def test_an_arm_that_failed_stays_in_the_family_of_equivalence():
    plain = around(0.95, 0.001)
    arms = {"a": plain + around(0, 0.001, seed=1), "b": np.append(plain[:-1], NAN)}
    first, second = judge(ACCURACY, {"plain": plain, **arms}, "plain")
    alone = verdict(ACCURACY, plain, arms["a"])
    assert first.p_equivalence == pytest.approx(2 * alone.p_equivalence)
    assert second.p_equivalence is None


def test_a_failed_run_loses_and_leaves_no_mean():
    plain, batch = around(0.94, 0.002), around(0.96, 0.002, seed=1)
    batch[3] = NAN
    one = verdict(ACCURACY, plain, batch)
    assert (one.difference, one.interval, one.failed) == (None, None, (1, 0))
    assert one.share_improved == 0.9
    assert one.p == pytest.approx(2 * 11 / 2**10)
    assert one.verdict == "better"
    assert "1 of 10 replicas of batch and 0 of plain diverged" in one.reason


def test_an_arm_that_always_fails_is_worse():
    one = verdict(ACCURACY, around(0.94, 0.002), np.full(10, NAN))
    assert (one.verdict, one.failed) == ("worse", (10, 0))


def test_failures_that_do_not_decide_say_how_many_seeds_would():
    plain, batch = np.full(6, NAN), np.append(NAN, np.full(5, 0.96))
    one = verdict(ACCURACY, plain, batch)
    assert (one.verdict, one.wins, one.losses, one.p) == ("inconclusive", 5, 0, 0.0625)
    assert one.seeds_needed == 2  # Six that tell, where five of six do.


def test_two_arms_that_always_fail_are_not_told_apart():
    one = verdict(ACCURACY, np.full(10, NAN), np.full(10, NAN))
    assert (one.verdict, one.p) == ("inconclusive", 1)


def test_ties_among_failures_do_not_hide_who_won():
    plain, batch = np.full(20, NAN), np.full(20, NAN)
    batch[:8] = 0.95
    assert verdict(ACCURACY, plain, batch).verdict == "better"


def test_more_arms_make_a_family_that_holm_adjusts():
    plain = around(0.95, 0.01)
    arms = {f"arm{i}": plain + around(0.006, 0.0076, seed=i + 1) for i in range(4)}
    alone = [verdict(ACCURACY, plain, arm).p for arm in arms.values()]
    family = judge(ACCURACY, {"plain": plain, **arms}, "plain")
    assert [one.arm for one in family] == list(arms)
    assert [one.p for one in family] == alone
    smallest = int(np.argmin(alone))
    assert family[smallest].p_holm == pytest.approx(4 * alone[smallest])
    for one in family:
        assert one.p < 0.05 <= one.p_holm
        assert one.verdict == "inconclusive"
        assert "not as one of 4 comparisons (Holm)" in one.reason


@pytest.fixture
def _no_planning(monkeypatch):
    """How many more seeds it would take is not simulated: it is most of the time."""
    monkeypatch.setattr(verdicts, "_seeds_needed", lambda *_: None)


@pytest.mark.usefixtures("_no_planning")
@pytest.mark.parametrize("n", [5, 10, 20])
def test_no_difference_is_called_one_in_at_most_five_percent_of_studies(n):
    # Runs of one arm differ by 0.2 to 0.4 points in the bundled study.
    rng = np.random.default_rng(0)
    judged = [verdict(ACCURACY, *rng.normal(0.95, 0.003, (2, n))) for _ in range(2000)]
    words = [one.verdict for one in judged]
    assert (words.count("better") + words.count("worse")) / 2000 <= 0.05
    # The t test alone keeps its level; two standard errors of 5% over 2,000 studies are a point.
    assert 0.04 <= np.mean([one.p < 0.05 for one in judged]) <= 0.06
    covered = np.mean([one.interval[0] < 0 < one.interval[1] for one in judged])
    assert 0.94 <= covered <= 0.96


@pytest.mark.usefixtures("_no_planning")
def test_no_difference_among_five_arms_is_called_one_in_at_most_five_percent_of_studies():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(500):
        names = ("plain", "a", "b", "c", "d")
        values = dict(zip(names, rng.normal(0.95, 0.01, (5, 10)), strict=True))
        wrong += any(one.verdict in ("better", "worse") for one in judge(ACCURACY, values, "plain"))
    assert wrong / 500 <= 0.05


@pytest.mark.usefixtures("_no_planning")
def test_a_difference_at_the_margin_is_called_equivalent_in_at_most_five_percent_of_studies():
    rng = np.random.default_rng(0)
    words = [
        verdict(ACCURACY, plain, plain + rng.normal(0.005, 0.004, 10)).verdict
        for plain in rng.normal(0.95, 0.01, (2000, 10))
    ]
    assert words.count("equivalent") / 2000 <= 0.05
