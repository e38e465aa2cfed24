"""What the probes of a study read, as rows and numbers of a claim."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from normlab.claims.claim import Row

if TYPE_CHECKING:
    from normlab.study import Comparison

__all__ = ["readings"]


def readings(
    comparison: Comparison, probe: str, name: str, quantity: str, *, log: bool = False
) -> dict[int, list[Row]]:
    """Return the course of what a probe read, the mean over layers at each step, by seed.

    Args:
        comparison: Of a study with one learning rate.
        probe: Which.
        name: Of one of its numbers.
        quantity: What the rows call it.
        log: Whether to take logarithms to base 2, before the mean.

    Returns:
        Rows whose place is the step. A replica that diverged has NaN at its last step instead.
    """
    frame = comparison.probes()
    frame = frame[(frame["probe"] == probe) & (frame["name"] == name)]
    with np.errstate(divide="ignore"):  # Of a gradient that vanished there is no logarithm.
        values = np.log2(frame["value"]) if log else frame["value"]
    means = frame.assign(value=values).groupby(["arm", "seed", "step"])["value"].mean()
    found: dict[int, list[Row]] = {}
    for replica in comparison.replicas().to_dict("records"):
        arm, seed = replica["arm"], replica["seed"]
        rows = found.setdefault(seed, [])
        if replica["status"] == "diverged":
            rows.append(Row(arm, quantity, float(replica["step"]), math.nan))
            continue
        course = means.loc[arm, seed]
        for step, value in zip(course.index.tolist(), course.tolist(), strict=True):
            rows.append(Row(arm, quantity, float(step), value))
    return found
