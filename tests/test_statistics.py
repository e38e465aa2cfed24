import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from normlab import statistics

# Multiples of 1/1024: far enough apart that no two sums are equal but for their last digits.
samples = hnp.arrays(
    float, st.integers(3, 12), elements=st.integers(-1024, 1024).map(lambda k: k / 1024)
).filter(lambda values: values.std() > 1e-3)


@given(samples, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_paired_t_is_scipys(differences, confidence):
    ours = statistics.paired_t(differences, confidence)
    theirs = stats.ttest_rel(differences, np.zeros_like(differences))
    low, high = theirs.confidence_interval(confidence)
    expected = differences.mean(), low, high, theirs.pvalue
    assert ours[:4] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ours.effect_size == pytest.approx(theirs.statistic / math.sqrt(len(differences)))


@pytest.mark.parametrize("jitter", [0, 1e-16])
def test_equal_differences_have_no_interval_and_the_sign_tests_p(jitter):
    nothing, half = (statistics.paired_t([mean, mean + jitter, *[mean] * 4]) for mean in (0, 0.5))
    assert all(math.isnan(test[i]) for test in (nothing, half) for i in (1, 2, 4))
    assert half.p == 2 / 2**6
    assert statistics.paired_t([0.0] * 6).p == 1
    assert statistics.equivalence_p([0.0] * 6, 0.1) == 1 / 2**6
    assert statistics.equivalence_p([0.2] * 6, 0.1) == 1


@given(samples)
@settings(max_examples=30, deadline=None)
def test_sign_flip_p_is_scipys_exact_permutation_test(differences):
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert statistics.sign_flip_p(differences) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [5, 10, 20, 40])
def test_sign_flip_p_reaches_its_least_value_and_not_less(n):
    assert statistics.sign_flip_p(np.arange(1.0, n + 1)) == 2 / 2**n


def test_sign_flip_p_of_no_difference_is_one():
    assert statistics.sign_flip_p(np.zeros(6)) == 1
    assert statistics.sign_flip_p([1.0, -1.0, 2.0, -2.0]) == 1


def test_sign_flip_p_beyond_forty_seeds_agrees_with_the_t_test():
    differences = np.random.default_rng(1).normal(0.3, 1, 60)
    exact = stats.ttest_1samp(differences, 0).pvalue
    assert statistics.sign_flip_p(differences) == pytest.approx(exact, abs=0.01)
    assert statistics.sign_flip_p(differences) == statistics.sign_flip_p(differences)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=50)
def test_holm_is_statsmodels(p):
    assert statistics.holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)


@given(samples, st.floats(0.01, 2))
def test_equivalence_p_is_statsmodels_tost(differences, margin):
    theirs = ttost_paired(differences, np.zeros_like(differences), -margin, margin)[0]
    assert statistics.equivalence_p(differences, margin) == pytest.approx(theirs, rel=1e-7)


@given(samples, st.floats(0.01, 2))
def test_equivalence_says_what_the_ninety_percent_interval_says(differences, margin):
    _, low, high, *_ = statistics.paired_t(differences, 0.90)
    inside = -margin < low and high < margin
    assert (statistics.equivalence_p(differences, margin) < 0.05) == inside


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (6, 0), (3, 5), (1, 9)])
def test_sign_test_p_counts_the_tails(wins, losses):
    n, k = wins + losses, max(wins, losses)
    tail = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
    assert statistics.sign_test_p(wins, losses) == pytest.approx(min(2 * tail, 1))


@pytest.mark.parametrize("effect", [0.3, 0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_seeds_for_difference_are_statsmodels(effect, alpha):
    theirs = TTestPower().solve_power(effect, alpha=alpha, power=0.8)
    assert statistics.seeds_for_difference(effect, alpha) == math.ceil(theirs)


def test_seeds_for_difference_gives_up_above_a_thousand():
    assert statistics.seeds_for_difference(0.05) is None


def test_seeds_for_equivalence_give_the_power_they_promise():
    n = statistics.seeds_for_equivalence(0.2, 1.0, margin=1.0)
    draws = np.random.default_rng(0).normal(0.2, 1.0, (4000, n))
    found = np.mean([statistics.equivalence_p(draw, 1.0) < 0.05 for draw in draws])
    assert 0.79 < found < 0.88


@pytest.mark.parametrize(("mean", "deviation"), [(1.0, 0.5), (2.0, 0.5), (0.99, 10.0)])
def test_seeds_for_equivalence_has_no_answer_at_or_near_the_margin(mean, deviation):
    assert statistics.seeds_for_equivalence(mean, deviation, margin=1.0) is None


@pytest.mark.parametrize(("wins", "losses", "ties"), [(5, 0, 0), (8, 2, 0), (5, 0, 5), (7, 3, 2)])
def test_seeds_for_sign_test_give_the_power_they_promise(wins, losses, ties):
    n = statistics.seeds_for_sign_test(wins, losses, ties)
    shares = [share / (wins + losses + ties) for share in (wins, losses, ties)]
    draws = np.random.default_rng(0).multinomial(n, shares, 2000)
    found = [w > x and statistics.sign_test_p(int(w), int(x)) < 0.05 for w, x, _ in draws]
    assert np.mean(found) > (0.5 if ties else 0.78)


def test_seeds_for_sign_test_has_no_answer_where_nobody_is_ahead():
    assert statistics.seeds_for_sign_test(4, 4) is None
    assert statistics.seeds_for_sign_test(0, 0, 10) is None
    assert statistics.seeds_for_sign_test(501, 499) is None


def test_mean_interval_is_taken_along_its_axis():
    values = np.random.default_rng(0).normal(size=(7, 3))
    mean, low, high = statistics.mean_interval(values, axis=0)
    for i in range(3):
        expected = statistics.paired_t(values[:, i])
        assert (mean[i], low[i], high[i]) == pytest.approx(expected[:3])
    turned = statistics.mean_interval(values.T, axis=1)
    assert np.array_equal([mean, low, high], turned)


def test_one_value_has_a_mean_and_no_interval():
    mean, low, high = statistics.mean_interval([3.0])
    assert (mean, math.isnan(low), math.isnan(high)) == (3.0, True, True)


def test_correlation_of_what_does_not_vary_is_not_a_number():
    assert statistics.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert math.isnan(statistics.correlation([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_what_they_promise(n):
    draws = np.random.default_rng(0).normal(0.3, 1.0, (20_000, n))
    _, low, high = statistics.mean_interval(draws, axis=1)
    assert 0.94 < np.mean((low < 0.3) & (high > 0.3)) < 0.96
