"""From a study to rows, and from rows to one number a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from normlab.claims.claim import Row
from normlab.study import Comparison
from normlab.training import Setting

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_seed", "course", "doublings", "ends", "merged", "points"]

Rows = dict[int, list[Row]]
"""By seed."""


def ends(comparison: Comparison, quantities: Mapping[str, str]) -> Rows:
    """Return what each replica ended with, every arm at its own learning rate.

    Args:
        comparison: Of a complete study.
        quantities: What rows call a metric, by its name in `Comparison.metrics`.

    Returns:
        Rows whose `at` is the learning rate; NaN where a replica diverged, or has no such number.
    """
    rows: Rows = {}
    for one in comparison.outcomes().reset_index().to_dict("records"):
        rows.setdefault(one["seed"], []).extend(
            Row(one["arm"], quantity, one["lr"], one[metric])
            for metric, quantity in quantities.items()
        )
    return rows


def course(comparison: Comparison, quantity: str) -> Rows:
    """Return test accuracy in the course of training, every arm at its own learning rate.

    Args:
        comparison: Of a complete study.
        quantity: What rows call it.

    Returns:
        Rows whose `at` is the step; of a replica that diverged those up to then.
    """
    frame, chosen = comparison.frame(), comparison.chosen
    rows: Rows = {}
    for one in frame[(frame["split"] == "test") & (frame["metric"] == "accuracy")].itertuples():
        if chosen[one.arm][one.seed] == Setting(one.lr, one.weight_decay):
            rows.setdefault(one.seed, []).append(Row(one.arm, quantity, one.step, one.value))
    return rows


def merged(parts: Iterable[Rows]) -> Rows:
    """Return the rows of several sources together.

    >>> merged([{0: [Row("a", "x", 0, 1.0)]}, {0: [Row("b", "x", 0, 2.0)]}])[0][1].arm
    'b'
    """
    rows: Rows = {}
    for part in parts:
        for seed, some in part.items():
            rows.setdefault(seed, []).extend(some)
    return rows


def by_seed(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return a quantity of which each arm has one value a seed: a row a seed, a column an arm."""
    rows = frame[frame["quantity"] == quantity]
    return rows.pivot(index="seed", columns="arm", values="value")


def points(frame: pd.DataFrame, quantity: str, arm: str, baseline: str) -> list[float]:
    """Return the difference of two arms' accuracies, seed by seed, in points.

    A replica that failed is worse than any other: the difference is infinite then, on the side of
    the one that did not fail, and NaN where both did.
    """
    accuracy = by_seed(frame, quantity).fillna(-np.inf)
    return (100 * (accuracy[arm] - accuracy[baseline])).tolist()


def doublings(frame: pd.DataFrame, quantity: str, arm: str, baseline: str) -> list[float]:
    """Return log2(baseline / arm) seed by seed, of a quantity that is better when it is smaller.

    Of a replica that failed it is infinite, and so is the ratio, on the side of the other; NaN
    where both failed.
    """
    values = by_seed(frame, quantity).fillna(np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):  # Of log2(0), and of ∞/∞.
        return np.log2(values[baseline] / values[arm]).tolist()
