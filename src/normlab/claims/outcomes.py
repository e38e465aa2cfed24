"""From a study to the rows of a claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from normlab.claims.claim import Row
from normlab.study import Comparison
from normlab.training import Setting

__all__ = ["Rows", "course", "ends", "merged"]

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
