"""From what two arms came to, seed by seed, to the numbers of a claim's part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["contrast", "of_arm"]


def of_arm(frame: pd.DataFrame, arm: str, quantity: str) -> list[float]:
    """Return an arm's values of a quantity that has one a seed, in the order of the seeds."""
    rows = frame[(frame["arm"] == arm) & (frame["quantity"] == quantity)]
    return [float(each) for each in rows.sort_values("seed")["value"]]


def contrast(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return `one − other` for every seed, as `normlab.claims.evidence.weigh` wants it.

    Args:
        ones: A number a seed; not finite where the replica failed.
        others: Of the same seeds.

    Returns:
        The differences; ∞ where only the other failed, −∞ where only the one did, and NaN where
        both did.

    >>> contrast([3.0, 1.0, math.nan, math.nan], [1.0, math.nan, 1.0, math.inf])
    [2.0, inf, -inf, nan]
    """
    return [
        _difference(one, other)
        for one, other in zip(map(float, ones), map(float, others), strict=True)
    ]


def _difference(one: float, other: float) -> float:
    failed = not np.isfinite(one), not np.isfinite(other)
    if all(failed):
        return math.nan
    if any(failed):
        return -math.inf if failed[0] else math.inf
    return one - other
