"""From the rows of a claim to one number a seed for each of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["contrast", "doublings", "of_arm", "points"]


def of_arm(
    frame: pd.DataFrame,
    arm: str,
    quantity: str | None = None,
    reduce: Callable[..., Any] = np.max,
) -> list[float]:
    """Return a number a seed, in the order of the seeds, from an arm's values.

    Args:
        frame: Columns `seed`, `arm`, `quantity`, `at` and `value`.
        arm: Whose.
        quantity: Which of its; None for all.
        reduce: Makes one of several; numpy's, in which what is not a number stays so.
    """
    chosen = frame[frame["arm"] == arm]
    if quantity is not None:
        chosen = chosen[chosen["quantity"] == quantity]
    groups = chosen.groupby("seed", sort=True)["value"]
    return [float(reduce(values.to_numpy())) for _, values in groups]


def contrast(
    ones: Sequence[float], others: Sequence[float], failed: float = -math.inf
) -> list[float]:
    """Return `one − other` for every seed, as `normlab.claims.evidence.weigh` wants it.

    Args:
        ones: A number a seed; not finite where the replica failed.
        others: Of the same seeds.
        failed: What a failure is worth: −∞ where more is better, ∞ where less is.

    Returns:
        The differences; infinite where one failed, and NaN where both did.

    >>> contrast([3.0, 1.0, math.nan, math.nan], [1.0, math.nan, 1.0, math.inf])
    [2.0, inf, -inf, nan]
    """
    pairs = zip(ones, others, strict=True)
    return [_or(one, failed) - _or(other, failed) for one, other in pairs]


def points(frame: pd.DataFrame, quantity: str, arm: str, baseline: str) -> list[float]:
    """Return the difference of two arms' accuracies for every seed, in points."""
    ours, theirs = (of_arm(frame, each, quantity) for each in (arm, baseline))
    return [100 * difference for difference in contrast(ours, theirs)]


def doublings(frame: pd.DataFrame, quantity: str, arm: str, baseline: str) -> list[float]:
    """Return log2(baseline / arm) for every seed, of what is better when it is smaller.

    Args:
        frame: As for `of_arm`.
        quantity: Above zero.
        arm: Positive where it has less than the baseline.
        baseline: The other.
    """
    ours, theirs = (of_arm(frame, each, quantity) for each in (arm, baseline))
    differences = contrast(theirs, ours, failed=math.inf)
    return [
        math.log2(theirs[i] / ours[i]) if math.isfinite(difference) else difference
        for i, difference in enumerate(differences)
    ]


def _or(value: float, failed: float) -> float:
    return value if math.isfinite(value) else failed
