"""What may be concluded from a few runs: intervals, tests and the seeds they need.

Plain functions of arrays. A run is a seed, and two arms are compared seed by seed, so most of them
take `differences`: one number a seed, shape (n,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "PairedT",
    "correlation",
    "equivalence_p",
    "holm",
    "mean_interval",
    "paired_t",
    "prediction_interval",
    "seeds_for_difference",
    "seeds_for_equivalence",
    "seeds_for_sign_test",
    "sign_flip_p",
    "sign_test_p",
]

_EXACT_UP_TO = 40
_MOST_SEEDS = 1000


class PairedT(NamedTuple):
    """A paired t test and the interval that belongs to it.

    Attributes:
        mean: Mean difference.
        low: Lower end of the confidence interval of the mean.
        high: Upper end.
        p: Two-sided p.
        effect_size: d_z, the mean over the standard deviation of the differences; NaN where they
            are all equal.
    """

    mean: float
    low: float
    high: float
    p: float
    effect_size: float


def paired_t(differences: ArrayLike, confidence: float = 0.95) -> PairedT:
    """Test whether the mean difference is zero, and say where it lies.

    Differences that are all equal have no spread to build an interval from: its ends are NaN, and p
    is the sign test's.

    Args:
        differences: Shape (n,), n ≥ 2.
        confidence: Of the interval.

    >>> round(paired_t([1.0, 2.0, 3.0]).low, 3)
    -0.484
    """
    values = np.asarray(differences, dtype=float)
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if _is_one_value(values):
        p = sign_test_p(len(values), 0) if mean else 1.0
        return PairedT(mean, math.nan, math.nan, p, math.nan)
    error = deviation / math.sqrt(len(values))
    half = _critical((1 - confidence) / 2, len(values)) * error
    p = 2 * _tail(abs(mean) / error, len(values))
    return PairedT(mean, mean - half, mean + half, p, mean / deviation)


def _is_one_value(values: NDArray[np.float64]) -> bool:
    """Say whether values are all equal, but for the last digits that subtraction leaves."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())))


def mean_interval(
    values: ArrayLike, axis: int = 0, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return mean, lower and upper end of the t interval of the mean along an axis.

    Over a curve's points these are pointwise intervals: each holds by itself, not all at once.

    Args:
        values: Any shape, with n ≥ 1 along `axis`; with n = 1 the ends are NaN.
        axis: The axis of the seeds.
        confidence: Of each interval.
    """
    array = np.asarray(values, dtype=float)
    n, mean = array.shape[axis], array.mean(axis)
    if n < 2:
        nothing = np.full_like(mean, np.nan)
        return mean, nothing, nothing
    half = _critical((1 - confidence) / 2, n) * array.std(axis, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def prediction_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval in which one more value would lie, if all are of one normal distribution.

    Args:
        values: Shape (n,), n ≥ 2.
        confidence: The chance that it does.

    >>> low, high = prediction_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-2.97, 6.97)
    """
    array = np.asarray(values, dtype=float)
    n, mean = len(array), array.mean()
    half = _critical((1 - confidence) / 2, n) * array.std(ddof=1) * np.sqrt(1 + 1 / n)
    return float(mean - half), float(mean + half)


def sign_flip_p(differences: ArrayLike) -> float:
    """Return the p of the sign-flip permutation test of the mean difference, two-sided.

    If the arms are exchangeable, each difference is as likely with the other sign. p is the share
    of the 2ⁿ sign patterns whose mean is at least as far from zero; its least value is 2/2ⁿ, so
    five seeds can never bring it below 0.0625. Exact up to 40 seeds: the sums of the two halves are
    sorted and counted against each other. Beyond, 100,000 patterns from a fixed generator.

    Args:
        differences: Shape (n,), n ≥ 1.

    >>> sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0])
    0.0625
    """
    values = np.asarray(differences, dtype=float)
    # Sums that are equal on paper differ in the last digits.
    observed = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if len(values) > _EXACT_UP_TO:
        generator, as_far = np.random.default_rng(0), 0
        for _ in range(10):
            signs = generator.choice([-1.0, 1.0], size=(10_000, len(values)))
            as_far += int(np.sum(np.abs(signs @ values) >= observed))
        return (1 + as_far) / (1 + 100_000)
    half = len(values) // 2
    left, right = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    above = len(right) - np.searchsorted(right, observed - left, side="left")
    below = np.searchsorted(right, -observed - left, side="right")
    # With an observed sum of zero a pattern counts on both sides; the share is then 1.
    return float(min((above.sum() + below.sum()) / (len(left) * len(right)), 1.0))


def _signed_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of all 2ⁿ sign patterns."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def sign_test_p(wins: int, losses: int) -> float:
    """Return the two-sided p of the exact sign test; ties are left out by the caller.

    >>> sign_test_p(6, 0)
    0.03125
    """
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust p values for a family of tests, by Holm's step-down method.

    Args:
        p: Shape (k,).

    Returns:
        Shape (k,), to be compared with α itself.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def equivalence_p(differences: ArrayLike, margin: float) -> float:
    """Return the p of two one-sided t tests that the mean difference lies inside ±margin.

    p < α says the same as: the 1 − 2α interval lies inside ±margin. For differences that are all
    equal, and inside, it is the one-sided sign test's.

    Args:
        differences: Shape (n,), n ≥ 2.
        margin: The largest difference that does not matter, in the differences' unit.

    >>> equivalence_p([0.1, -0.1, 0.2, -0.2, 0.0], margin=1.0) < 0.05
    True
    """
    values = np.asarray(differences, dtype=float)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if _is_one_value(values):
        return 0.5 ** len(values) if abs(mean) < margin else 1.0
    return _tail((margin - abs(mean)) / error, len(values))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Return Pearson's correlation over seeds, NaN where an arm does not vary.

    Pairing is worth what this is: at 0, paired differences are no narrower than unpaired ones.

    Args:
        first: Shape (n,).
        second: Shape (n,).
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def seeds_for_difference(effect_size: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return how many seeds a paired t test needs to find an effect of this size.

    Args:
        effect_size: d_z, as it would be if the runs so far were right about it.
        alpha: Two-sided level of the test.
        power: The chance of finding it, and with the right sign.

    Returns:
        The least number of seeds, or None above 1,000.

    >>> [seeds_for_difference(d) for d in (2, 1.5, 1, 0.8, 0.5)]
    [5, 6, 10, 15, 34]
    """

    def reaches(n: int) -> bool:
        return _power(abs(effect_size) * math.sqrt(n), alpha / 2, n) >= power

    return _least(reaches)


def seeds_for_equivalence(
    mean: float, deviation: float, margin: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Return how many seeds two one-sided tests need to find a difference inside ±margin.

    Args:
        mean: The mean difference, as it would be if the runs so far were right about it.
        deviation: The standard deviation of the differences, likewise.
        margin: Of equivalence.
        alpha: Level of each one-sided test.
        power: The chance of finding it; taken as the sum of the two tests' powers less one, which
            is never more than their joint power.

    Returns:
        The least number of seeds, or None above 1,000 or where the mean is outside the margin.

    >>> seeds_for_equivalence(0.0, 1.0, margin=1.0)
    11
    """
    if abs(mean) >= margin or deviation == 0:
        return None

    def reaches(n: int) -> bool:
        error = deviation / math.sqrt(n)
        below, above = (_power((margin + side) / error, alpha, n) for side in (-mean, mean))
        return below + above - 1 >= power

    return _least(reaches)


def seeds_for_sign_test(
    wins: int, losses: int, ties: int = 0, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Return how many seeds a sign test needs if shares of wins and losses stay as they are.

    Args:
        wins: Seeds so far in which the arm was better.
        losses: Seeds in which it was worse.
        ties: Seeds that say nothing.
        alpha: Two-sided level of the test.
        power: The chance of a decision, and with the right sign.

    Returns:
        The least number of seeds, or None above 1,000 or where neither side is ahead.

    >>> seeds_for_sign_test(5, 0), seeds_for_sign_test(3, 3)
    (6, None)
    """
    from scipy import stats

    told = wins + losses
    if wins == losses:
        return None
    share = max(wins, losses) / told

    def reaches(n: int) -> bool:
        # isf is the most that chance exceeds with this probability: one more is significant.
        needed = stats.binom.isf(alpha / 2, n, 0.5) + 1
        return bool(stats.binom.sf(needed - 1, n, share) >= power)

    # The power of a test of counts goes up and down with n, so every n is tried.
    decisive = next((n for n in range(1, _MOST_SEEDS + 1) if reaches(n)), None)
    total = None if decisive is None else math.ceil(decisive * (told + ties) / told)
    return total if total is not None and total <= _MOST_SEEDS else None


def _critical(tail: float, n: int) -> float:
    """Return what Student's t of n values exceeds with this probability."""
    from scipy import special

    return -float(special.stdtrit(n - 1, tail))


def _tail(t: float, n: int) -> float:
    """Return the probability that Student's t of n values exceeds t."""
    from scipy import special

    return float(special.stdtr(n - 1, -t))


def _power(shift: float, tail: float, n: int) -> float:
    """Return the probability that a one-sided t test rejects, `shift` standard errors from zero."""
    from scipy import stats

    return float(stats.nct.sf(_critical(tail, n), n - 1, shift))


def _least(reaches: Callable[[int], bool]) -> int | None:
    """Return the least n of 2 to 1,000 for which a growing condition holds."""
    if not reaches(_MOST_SEEDS):
        return None
    low, high = 1, _MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
