"""How much the learning rate matters to an arm: accuracy by rate, and the range that works.

Plain functions of arrays first, then the frames that `Comparison` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normlab.errors import InputError
from normlab.statistics import mean_interval, paired_t
from normlab.study.declaration import Study
from normlab.study.outcomes import choose, validation_finals
from normlab.training import Replica, Setting

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "WITHIN",
    "RangeDifference",
    "RateRange",
    "by_rate",
    "own_decades",
    "range_difference",
    "ranges_frame",
    "sensitivity_frame",
    "summarize_sensitivity",
    "widest_range",
]

WITHIN = 0.01
"""How far under an arm's best accuracy a rate may lie to be in its range: one point."""

# Sums that are equal on paper differ in the last digits; accuracies do in the fifth at the least.
_ROUNDING = 1e-9
_RANGE = [
    *("arm", "best_lr", "best", "low", "high", "decades", "open_low", "open_high"),
    *("n", "own_decades", "without", "difference", "difference_low", "difference_high"),
    *("reported_lr", "reported_weight_decay"),
]


class RateRange(NamedTuple):
    """Neighbouring learning rates of a grid, all about as good as the best one.

    Attributes:
        best: The rate with the best accuracy; the lowest of equals.
        low: The lowest rate of the range.
        high: The highest.
        open_low: Whether the grid ends at `low`, so that the range may go on below it.
        open_high: Likewise at `high`, above it.
    """

    best: float
    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        """Its width, log₁₀(high / low); the least that it may be where an end is open."""
        return math.log10(self.high / self.low)


class RangeDifference(NamedTuple):
    """How much wider one arm's ranges are than another's, seed by seed.

    Attributes:
        mean: Mean over seeds, in decades; NaN without seeds, or where one has no range.
        low: Lower end of the t interval of the mean; NaN also where there is one seed, or where
            all differences are equal.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def widest_range(
    rates: Sequence[float], accuracies: ArrayLike, within: float = WITHIN
) -> RateRange | None:
    """Return the widest range of rates around the best whose accuracy is near the best.

    Every rate in it, and none of its neighbours outside, is at most `within` under the best. Of
    several rates that are best the one with the widest range counts, of equally wide ranges the
    lowest.

    Args:
        rates: Ascending, above 0; shape (k,).
        accuracies: As shares, 0 for a rate at which training diverged; shape (k,).
        within: How far under the best, as a share.

    Returns:
        The range; None if no rate has any accuracy.

    Raises:
        InputError: Rates and accuracies do not go together, or rates do not ascend from above 0.

    >>> widest_range([0.001, 0.01, 0.1, 1.0], [0.95, 0.955, 0.96, 0.3])
    RateRange(best=0.1, low=0.001, high=0.1, open_low=True, open_high=False)
    """
    values = np.asarray(accuracies, dtype=float)
    if values.shape != (len(rates),) or not len(rates):
        raise InputError(
            f"expected one accuracy for each rate, got {len(rates)} rates and accuracies of shape "
            f"{values.shape}: give both in the same order"
        )
    if rates[0] <= 0 or any(low >= high for low, high in pairwise(rates)):
        raise InputError(f"expected rates that ascend from above 0, got {list(rates)}: sort them")
    best = float(values.max())
    if not best > 0:
        return None
    near = values >= best - within - _ROUNDING
    found: list[RateRange] = []
    for top in map(int, np.flatnonzero(values >= best - _ROUNDING)):
        low = high = top
        while low > 0 and near[low - 1]:
            low -= 1
        while high < len(rates) - 1 and near[high + 1]:
            high += 1
        ends = low == 0, high == len(rates) - 1
        found.append(RateRange(rates[top], rates[low], rates[high], *ends))
    return max(found, key=lambda one: one.decades)


def own_decades(
    rates: Sequence[float], accuracies: ArrayLike, within: float = WITHIN
) -> NDArray[np.float64]:
    """Return the width of each seed's own range.

    Args:
        rates: As `widest_range`.
        accuracies: Shape (n, k): seeds, rates.
        within: As `widest_range`.

    Returns:
        Shape (n,), in decades; NaN for a seed without a range.

    >>> own_decades([0.01, 0.1], [[0.9, 0.9], [0.9, 0.8], [0.0, 0.0]])
    array([ 1.,  0., nan])
    """
    ranges = [widest_range(rates, row, within) for row in np.asarray(accuracies, dtype=float)]
    return np.array([math.nan if one is None else one.decades for one in ranges])


def range_difference(
    ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95
) -> RangeDifference:
    """Return how much wider an arm's ranges are than another's.

    The unit is the seed, as in all of normlab's comparisons: a seed's two ranges are compared with
    each other, and the interval is the paired t interval of the mean, which covers what it
    promises from a few seeds. A bootstrap of the ranges of mean accuracies does not: whether a rate
    at which one replica in twenty diverges is inside hangs on seeds that a few do not show. A
    seed's own range is not smoothed by the others, so the mean of such widths need not be the
    width of the range of the means.

    Args:
        ours: An arm's own decades, shape (n,), NaN for a seed without a range.
        theirs: The other's, for the same seeds.
        confidence: Of the interval.

    >>> one = range_difference([1.0, 2.0, 1.5], [0.5, 0.5, 0.5])
    >>> [round(number, 3) for number in one]
    [1.0, -0.242, 2.242]
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if len(differences) < 2:
        mean = float(differences[0]) if len(differences) else math.nan
        return RangeDifference(mean, math.nan, math.nan)
    return RangeDifference(*paired_t(differences, confidence)[:3])


def by_rate(study: Study, table: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Return what each arm ended with at each learning rate, seed by seed.

    Of several weight decays each seed has, at each rate, the one that is best there on validation
    data by the other seeds: the question is which rates can be used, with all else chosen well.

    Args:
        study: What was declared.
        table: As `outcome_table`.
        seeds: Those that are finished at every setting, in every arm.

    Returns:
        Index `arm`, `lr`, `seed`; columns `weight_decay`, `diverged`, and for each split the final
        accuracy, 0 where the replica diverged: as choosing a rate counts it.
    """
    import pandas as pd

    finals, decays = validation_finals(table), sorted(study.weight_decay)
    chosen = [
        Replica(arm, lr, seed, setting.weight_decay)
        for arm in study.arms
        for lr in sorted(study.lr)
        for seed, setting in choose(
            finals, arm, [Setting(lr, decay) for decay in decays], seeds
        ).items()
    ]
    index = pd.MultiIndex.from_tuples(chosen, names=Replica._fields)
    ends = table.reindex(index).reset_index("weight_decay")
    diverged = ends["status"] == "diverged"
    splits = ["train", *["validation"] * bool(study.validation), "test"]
    accuracies = {split: ends[f"final_{split}_accuracy"].mask(diverged, 0.0) for split in splits}
    return ends[["weight_decay"]].assign(diverged=diverged, **accuracies)


def sensitivity_frame(ends: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Return the mean accuracy at each rate, as `Comparison.sensitivity` has it.

    Args:
        ends: As `by_rate`.
        confidence: Of the intervals.
    """
    import pandas as pd

    splits = [split for split in ends.columns if split not in ("weight_decay", "diverged")]
    rows = []
    for (arm, lr), group in ends.groupby(["arm", "lr"], sort=False):
        decay = group["weight_decay"].mode().iloc[0]  # The lowest of equally frequent ones.
        diverged = int(group["diverged"].sum())
        for split in splits:
            mean, low, high = map(float, mean_interval(group[split], confidence=confidence))
            if diverged:  # Failures and accuracies have no common spread.
                low = high = math.nan
            rows.append((arm, lr, decay, split, len(group), diverged, mean, low, high))
    columns = ["arm", "lr", "weight_decay", "split", "n", "diverged", "mean", "low", "high"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs["band"] = f"pointwise {confidence * 100:g}% t interval of the mean"
    return frame


def ranges_frame(ends: pd.DataFrame, study: Study, reported: Mapping[str, Setting]) -> pd.DataFrame:
    """Return the range of rates that works for each arm, as `Comparison.ranges` has it.

    Args:
        ends: As `by_rate`.
        study: What was declared.
        reported: The setting that stands for each arm.
    """
    import pandas as pd

    rates = sorted(study.lr)
    seeds = {arm: ends["test"].xs(arm).unstack("lr") for arm in study.arms} if len(ends) else {}
    own = {arm: own_decades(rates, accuracies) for arm, accuracies in seeds.items()}
    rows = []
    for arm, accuracies in seeds.items():
        means = accuracies.mean()
        found = widest_range(rates, means)
        row = {"arm": arm, "n": len(accuracies), "open_low": False, "open_high": False}
        row |= {"own_decades": own[arm].mean(), "without": np.isnan(own[arm]).sum()}
        row["reported_lr"], row["reported_weight_decay"] = reported[arm]
        if found is not None:
            row |= {"best_lr": found.best, "best": float(means[found.best])}
            row |= {name: getattr(found, name) for name in ("low", "high", "decades")}
            row |= {"open_low": found.open_low, "open_high": found.open_high}
        if arm != study.baseline:
            difference = range_difference(own[arm], own[study.baseline], study.confidence)
            row["difference"] = difference.mean
            row["difference_low"], row["difference_high"] = difference.low, difference.high
        rows.append(row)
    return pd.DataFrame(rows, columns=_RANGE)


def summarize_sensitivity(rates: pd.DataFrame, ranges: pd.DataFrame) -> dict[str, Any]:
    """Return both frames for JSON, which has no NaN.

    Args:
        rates: As `sensitivity_frame`.
        ranges: As `ranges_frame`.

    Returns:
        `within`, how far under its best an arm's range goes; `rates` and `ranges`, the rows.
    """
    rows = {
        name: frame.astype(object).where(frame.notna(), None).to_dict("records")
        for name, frame in (("rates", rates), ("ranges", ranges))
    }
    return {"within": WITHIN, **rows}
