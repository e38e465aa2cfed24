"""From what two arms came to, seed by seed, to the numbers of a claim's part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["contrast", "of_arm"]


def of_arm(frame: pd.DataFrame, arm: str, quantity: str) -> list[float]:
    """Return an arm's values of a quantity that has one a seed, in the order of the seeds."""
    rows = frame[(frame["arm"] == arm) & (frame["quantity"] == quantity)]
    return [float(each) for each in rows.sort_values("seed")["value"]]


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


def _or(value: float, failed: float) -> float:
    return value if math.isfinite(value) else failed
