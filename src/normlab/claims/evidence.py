"""From measured numbers to a word: supported, refuted or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from normlab import statistics
from normlab.claims.claim import Part

__all__ = ["Evidence", "Word", "overall", "weigh"]

Word = Literal["supported", "refuted", "inconclusive"]

_LEVEL = 0.05
_MINIMUM_SEEDS = 5  # As for verdicts: with fewer, the spread is not known.
_ALL_ALIKE = 6  # Values that are equal say something from here on: 2/2⁶ is below the level.


@dataclass(frozen=True)
class Evidence:
    """What was found about a part of a claim.

    Attributes:
        part: Which.
        n: Seeds.
        mean: Over seeds; the largest size where the part is exact; None if one is not finite.
        interval: Of the mean; None for exact parts, and where a replica failed.
        confidence: Of the interval.
        wins: Seeds whose number is above zero.
        losses: Seeds whose number is below.
        word: The verdict on the part.
        reason: What it rests on, where that is not the interval.
    """

    part: Part
    n: int
    mean: float | None
    interval: tuple[float, float] | None
    confidence: float
    wins: int
    losses: int
    word: Word
    reason: str = ""


def weigh(part: Part, values: Sequence[float], parts: int = 1) -> Evidence:
    """Return what the numbers of one part say.

    *More* is supported if the interval lies above zero, unless all of it is below the margin; it is
    refuted if the interval lies below zero, or inside ±margin. *Equal* is supported if the interval
    lies inside ±margin, and refuted if it lies outside. *Exact* is supported if no number is
    outside. Where a number is infinite, a replica of one arm failed and the other's did not: then
    only the signs are counted.

    Args:
        part: What is claimed.
        values: One number a seed; infinite where one side failed, NaN where both did.
        parts: Of how many parts the claim is made; the level is divided among them.

    >>> weigh(Part("difference", "more", 0.5), [1.0, 1.1, 0.9, 1.0, 1.2]).word
    'supported'
    >>> weigh(Part("difference", "equal", 0.5), [1.0, 1.1, 0.9, 1.0, 1.2]).word
    'refuted'
    """
    numbers = np.asarray(values, dtype=float)
    wins, losses = int((numbers > 0).sum()), int((numbers < 0).sum())
    confidence = 1 - _LEVEL / parts

    def found(
        word: Word,
        mean: float | None = None,
        interval: tuple[float, float] | None = None,
        reason: str = "",
    ) -> Evidence:
        return Evidence(part, len(numbers), mean, interval, confidence, wins, losses, word, reason)

    if part.says == "exact":
        if not np.isfinite(numbers).all():
            return found("refuted", reason="a number is not finite")
        worst = float(np.abs(numbers).max(initial=0.0))
        return found("supported" if worst <= part.margin else "refuted", worst)
    if len(numbers) < _MINIMUM_SEEDS:
        return found("inconclusive", reason=f"{len(numbers)} seeds are too few to judge by")
    if not np.isfinite(numbers).all():
        return _by_signs(part, wins, losses, found, _LEVEL / parts)
    result = statistics.paired_t(numbers, confidence)
    low, high = result.low, result.high
    if math.isnan(low):  # All of them are equal.
        if len(numbers) < _ALL_ALIKE:
            return found("inconclusive", result.mean, reason="all equal, and too few to judge by")
        low = high = result.mean
    return found(_word(part, low, high), result.mean, (low, high))


def _word(part: Part, low: float, high: float) -> Word:
    inside = -part.margin < low and high < part.margin
    if part.says == "equal":
        if inside:
            return "supported"
        return "refuted" if low >= part.margin or high <= -part.margin else "inconclusive"
    if inside or high < 0:
        return "refuted"
    return "supported" if low > 0 else "inconclusive"


def _by_signs(
    part: Part, wins: int, losses: int, found: Callable[..., Evidence], level: float
) -> Evidence:
    failed = "a replica failed, so there is no mean"
    if part.says == "equal":
        return found("inconclusive", reason=failed)
    p = statistics.sign_test_p(wins, losses)
    reason = f"{failed}; as claimed in {wins} seeds, otherwise in {losses}, sign test p = {p:.2g}"
    if p >= level:
        return found("inconclusive", reason=reason)
    return found("supported" if wins > losses else "refuted", reason=reason)


def overall(evidence: Iterable[Evidence]) -> Word:
    """Return the verdict on a claim from those on its parts."""
    words = {each.word for each in evidence}
    if "refuted" in words:
        return "refuted"
    return "supported" if words == {"supported"} else "inconclusive"
