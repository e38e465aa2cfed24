"""Verdicts: what the differences between two arms, seed by seed, allow to be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normlab import statistics

__all__ = ["MINIMUM_SEEDS", "Metric", "Verdict", "Word", "judge"]

MINIMUM_SEEDS = 5
"""With fewer there is no verdict: too few differences to know their spread by."""

Word = Literal["better", "worse", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Metric:
    """A number that a replica ends with.

    Attributes:
        name: For programs.
        label: For people.
        higher_is_better: Which way is better.
        margin: The largest difference that does not matter, or None if none was declared.
        unit: `points` (of accuracy, shown × 100), `nats` or `steps`.
        failure: What it means that a replica has no value.
    """

    name: str
    label: str
    higher_is_better: bool
    margin: float | None
    unit: Literal["points", "nats", "steps"]
    failure: str = "diverged"

    def show(self, value: float, *, signed: bool = False) -> str:
        """Return a value, or with `signed` a difference, as people read it, without its unit.

        >>> Metric("a", "accuracy", True, None, "points").show(0.0125, signed=True)
        '+1.25'
        """
        scaled = value * 100 if self.unit == "points" else value
        digits = {"points": 2, "nats": 4, "steps": 0}[self.unit]
        return f"{scaled:{'+' if signed else ''},.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Verdict:
    """What one metric says of one arm against the baseline.

    Attributes:
        metric: Which number.
        arm: Which arm.
        baseline: Against which.
        n: Pairs of replicas, one a seed.
        confidence: Of the interval.
        wins: Seeds in which the arm was better.
        losses: Seeds in which it was worse.
        failed: Replicas without a value, of the arm and of the baseline.
        equivalence_margin: The declared one.
        difference: Mean of arm − baseline, in the metric's unit (accuracy as a share); None where
            a replica failed, for then there is no mean.
        interval: Confidence interval of the difference; None where all differences are equal.
        deviation: Standard deviation of the differences.
        effect_size: d_z, the difference in standard deviations of the differences.
        correlation: Between the arms over seeds; pairing is worth nothing near 0.
        p: Of the paired t test; of the exact sign test where a replica failed or all differences
            are equal.
        p_holm: `p`, adjusted for the family of all arms against the baseline.
        p_sign_flip: Of the sign-flip permutation test, a second opinion.
        p_equivalence: Of two one-sided tests against the margin, adjusted likewise.
        verdict: The word, or None with the reason in `reason`.
        reason: Why there is no verdict, or what goes with it.
        seeds_needed: About how many seeds more a study would need to decide it; 0 if it is decided,
            None if no number up to 1,000 in all would, with things as they are.
    """

    metric: Metric
    arm: str
    baseline: str
    n: int
    confidence: float
    wins: int
    losses: int
    failed: tuple[int, int]
    equivalence_margin: float | None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    deviation: float | None = None
    effect_size: float | None = None
    correlation: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_sign_flip: float | None = None
    p_equivalence: float | None = None
    verdict: Word | None = None
    reason: str = ""
    seeds_needed: int | None = None

    @property
    def share_improved(self) -> float | None:
        """Share of seeds in which the arm was better."""
        return self.wins / self.n if self.n else None


def judge(
    metric: Metric,
    values: Mapping[str, ArrayLike],
    baseline: str,
    confidence: float = 0.95,
    minimum_seeds: int = MINIMUM_SEEDS,
) -> list[Verdict]:
    """Compare every arm with the baseline.

    An arm is *equivalent* if two one-sided tests put the difference inside ±margin, *better* or
    *worse* if a paired t test tells it from zero, and otherwise the result is *inconclusive*; both
    kinds of p are adjusted by Holm's method over the arms. Equivalence goes first: a difference
    that was declared not to matter does not begin to matter because it was measured well.

    A replica that failed has no value to average. If there is one, the exact sign test stands in
    for the t test, a failed replica loses against one that did not fail, and no size is given.

    Args:
        metric: What the values are.
        values: For each arm, shape (n,): one value a seed, in the same order, NaN for a failure.
        baseline: The arm that the others are compared with.
        confidence: Of intervals; the tests' level is 1 − confidence.
        minimum_seeds: With fewer seeds there is no verdict.

    >>> accuracy = Metric("final_test_accuracy", "accuracy", True, 0.005, "points")
    >>> plain, batch = [0.94, 0.95, 0.94, 0.93, 0.94], [0.96, 0.97, 0.965, 0.96, 0.965]
    >>> judge(accuracy, {"plain": plain, "batch": batch}, "plain")[0].verdict
    'better'
    """
    reference = np.asarray(values[baseline], dtype=float)
    measured = [
        _measure(metric, arm, np.asarray(values[arm], dtype=float), baseline, reference, confidence)
        for arm in values
        if arm != baseline
    ]
    p_holm = _adjusted([one.p for one in measured])
    p_equivalence = _adjusted([one.p_equivalence for one in measured])
    return [
        _decide(
            replace(one, p_holm=p_holm[i], p_equivalence=p_equivalence[i]),
            minimum_seeds,
            family=len(measured),
        )
        for i, one in enumerate(measured)
    ]


def _measure(
    metric: Metric,
    arm: str,
    ours: NDArray[np.float64],
    baseline: str,
    theirs: NDArray[np.float64],
    confidence: float,
) -> Verdict:
    """Fill in the numbers; the decision comes when the whole family is known."""
    n, sign = len(ours), 1 if metric.higher_is_better else -1
    failed = int(np.isnan(ours).sum()), int(np.isnan(theirs).sum())
    # A failed replica is worse than any other.
    our_gain = np.where(np.isnan(ours), -np.inf, sign * ours)
    their_gain = np.where(np.isnan(theirs), -np.inf, sign * theirs)
    wins, losses = int(np.sum(our_gain > their_gain)), int(np.sum(our_gain < their_gain))
    one = Verdict(
        metric=metric,
        arm=arm,
        baseline=baseline,
        n=n,
        confidence=confidence,
        wins=wins,
        losses=losses,
        failed=failed,
        equivalence_margin=metric.margin,
    )
    if any(failed):
        return replace(one, p=statistics.sign_test_p(wins, losses))
    differences = ours - theirs
    if n < 2:
        return replace(one, difference=float(differences[0]) if n else None)
    test = statistics.paired_t(differences, confidence)
    return replace(
        one,
        difference=test.mean,
        interval=None if math.isnan(test.low) else (test.low, test.high),
        deviation=float(differences.std(ddof=1)),
        effect_size=_or_none(test.effect_size),
        correlation=_or_none(statistics.correlation(ours, theirs)),
        p=test.p,
        p_sign_flip=statistics.sign_flip_p(differences),
        p_equivalence=(
            None if metric.margin is None else statistics.equivalence_p(differences, metric.margin)
        ),
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _decide(one: Verdict, minimum_seeds: int, family: int) -> Verdict:
    alpha = 1 - one.confidence
    if one.n < minimum_seeds:
        return replace(
            one,
            reason=f"no verdict from {one.n} seed{'s' * (one.n != 1)}: "
            f"at least {minimum_seeds} are needed",
            seeds_needed=minimum_seeds - one.n,
        )
    reasons = []
    if any(one.failed):
        ours, theirs = one.failed
        reasons.append(
            f"{ours} of {one.n} replicas of {one.arm} and {theirs} of {one.baseline} "
            f"{one.metric.failure}, so the sign test decides and there is no mean difference"
        )
    elif one.interval is None:
        reasons.append("all differences are equal, so the sign test decides and has no interval")
    differs = one.p_holm is not None and one.p_holm < alpha
    if one.p_equivalence is not None and one.p_equivalence < alpha:
        if differs:
            reasons.append("a difference is there, and it is inside the margin")
        return replace(one, verdict="equivalent", reason="; ".join(reasons), seeds_needed=0)
    if differs:
        better = one.wins > one.losses
        if one.difference is not None:
            better = (one.difference > 0) == one.metric.higher_is_better
        word: Word = "better" if better else "worse"
        return replace(one, verdict=word, reason="; ".join(reasons), seeds_needed=0)
    if one.p is not None and one.p < alpha:
        reasons.append(f"it would pass alone, but not as one of {family} comparisons (Holm)")
    return replace(
        one,
        verdict="inconclusive",
        reason="; ".join(reasons),
        seeds_needed=_seeds_needed(one, alpha / family),
    )


def _seeds_needed(one: Verdict, alpha: float) -> int | None:
    """Return how many more seeds would decide it four times in five, if this is how things are."""
    totals = []
    margin = one.equivalence_margin
    if one.interval is None:  # The sign test decides.
        ties = one.n - one.wins - one.losses
        totals.append(statistics.seeds_for_sign_test(one.wins, one.losses, ties, alpha))
        if one.difference is not None and margin and abs(one.difference) < margin:
            totals.append(math.floor(-math.log2(alpha)) + 1)  # The least n with 1/2ⁿ under α.
    if one.effect_size:
        totals.append(statistics.seeds_for_difference(one.effect_size, alpha))
    if one.interval is not None and one.difference is not None and one.deviation and margin:
        totals.append(
            statistics.seeds_for_equivalence(one.difference, one.deviation, margin, alpha)
        )
    reached = [total for total in totals if total is not None]
    return max(min(reached) - one.n, 1) if reached else None


def _adjusted(p: Sequence[float | None]) -> list[float | None]:
    """Adjust by Holm's method; a comparison without a p still belongs to the declared family."""
    adjusted = statistics.holm([1.0 if value is None else value for value in p])
    return [
        None if before is None else float(after) for before, after in zip(p, adjusted, strict=True)
    ]
