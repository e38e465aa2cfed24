"""Up to which learning rate a network trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import contrast
from normlab.claims.setups import fashion_relu
from normlab.claims.work import Work
from normlab.study import Comparison

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "accuracies", "rates_that_train"]

_ARMS = ("plain", "batch")
_ACCURACY = "training accuracy at the end"
_ENOUGH = 0.8  # Of the arm's best. Where a run has failed, it stands near chance, which is 0.1.
_PART = "log₂(largest rate with batch norm / without)"


def accuracies(comparison: Comparison) -> dict[tuple[str, int], dict[float, float]]:
    """Return the final accuracy on the training images, in eval mode, of every replica.

    Returns:
        By arm and seed, and then by rate; NaN for a replica that diverged.
    """
    frame = comparison.frame()
    frame = frame[(frame["split"] == "train") & (frame["metric"] == "accuracy")]
    final = frame.sort_values("step").groupby(["arm", "seed", "lr"]).last()["value"]
    found: dict[tuple[str, int], dict[float, float]] = {}
    for replica in comparison.replicas().to_dict("records"):
        arm, seed, rate = replica["arm"], replica["seed"], replica["lr"]
        done = replica["status"] == "done"
        found.setdefault((arm, seed), {})[rate] = final[arm, seed, rate] if done else math.nan
    return found


def rates_that_train(by_rate: Mapping[float, float]) -> list[float]:
    """Return the rates at which an arm trained, the smallest first.

    Args:
        by_rate: The accuracy at each rate; NaN where the replica diverged.

    Returns:
        Those at which it is 80% or more of the largest.

    >>> rates_that_train({0.1: 0.8, 0.2: 0.9, 0.4: 0.7, 0.8: 0.75, 1.6: 0.1, 3.2: math.nan})
    [0.1, 0.2, 0.8]
    """
    finite = {rate: value for rate, value in by_rate.items() if math.isfinite(value)}
    best = max(finite.values(), default=0.0)
    return sorted(rate for rate, value in finite.items() if value >= _ENOUGH * best)


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    found = accuracies(work.compare(fashion_relu(work.quick)))
    for seed in work.seeds:
        yield (
            seed,
            [
                Row(arm, _ACCURACY, rate, value)
                for arm in _ARMS
                for rate, value in sorted(found[arm, seed].items())
            ],
        )


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    largest = {
        arm: [
            math.log2(
                max(
                    rates_that_train(dict(zip(rows["at"], rows["value"], strict=True))),
                    default=math.nan,
                )
            )
            for _, rows in frame[frame["arm"] == arm].groupby("seed")
        ]
        for arm in _ARMS
    }
    return {_PART: contrast(largest["batch"], largest["plain"])}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame.fillna({"value": 0.0}),
        title="Accuracy on the training images, by learning rate; 0 for a run that diverged",
        x="learning rate",
        y=_ACCURACY,
        arms=_ARMS,
        log_x=True,
    )


CLAIM = Claim(
    name="max-learning-rate",
    statement="A network with batch norm trains at larger learning rates than one without.",
    source="Ioffe and Szegedy, 2015; Bjorck, Gomes, Selman and Weinberger, 2018",
    metric=f"{_PART}: the largest rate at which a run ends with finite numbers and with at least "
    "80% of the best accuracy on training images that its arm and seed reach at any rate.",
    published="At five times its usual rate the plain network overflowed.",
    setup="Fashion-MNIST, 55,000 training images, a perceptron of 4×128 ReLUs, batch 128, SGD, "
    "rates 1/16, 1/8, … 32, five epochs. Quick: 15,000 images and two epochs.",
    # Twice the rate is the least that this grid can tell, and less would not be worth a layer.
    parts=(Part(_PART, "more", 1.0, "doublings"),),
    measure=_measure,
    effects=_effects,
    chart=_chart,
)
