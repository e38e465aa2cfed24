"""With batch norm, dropout is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import points
from normlab.claims.outcomes import course, ends, merged
from normlab.claims.setups import alone, tutorial
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_FINAL = "final test accuracy"
_COURSE = "test accuracy"
_BOTH = "batch+dropout:0.5"
_ARMS = ("plain", "dropout:0.5", "batch", _BOTH)
_MARGIN = 1.0
_PARTS = {f"batch − {rival} + {_MARGIN:g}": rival for rival in (_BOTH, "dropout:0.5")}


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    study = tutorial("cifar10-mlp-dropout", work.quick)
    parts = []
    for each in (study, alone(study, _BOTH)):
        comparison = work.compare(each)
        parts += [ends(comparison, {"final_test_accuracy": _FINAL}), course(comparison, _COURSE)]
    rows = merged(parts)
    for seed in work.seeds:
        yield seed, rows[seed]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {
        part: [value + _MARGIN for value in points(frame, _FINAL, "batch", rival)]
        for part, rival in _PARTS.items()
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame[frame["quantity"] == _COURSE],
        title="A perceptron on CIFAR-10 with batch norm, dropout, both or neither",
        x="steps",
        y=_COURSE,
        arms=_ARMS,
    )


CLAIM = Claim(
    name="dropout-rival",
    statement="With batch norm a network does not need dropout.",
    source="Ioffe and Szegedy, 2015",
    metric=(
        f"Final test accuracy of batch − {_BOTH}, and of batch − dropout:0.5, in points, each + "
        f"{_MARGIN:g}: above zero where batch norm alone is not worse by more than a point."
    ),
    published=(
        "Contested: CaffeNet with batch norm got 0.513 without dropout, 0.527 with a rate of 0.2 "
        "and 0.499 with 0.5."
    ),
    setup=(
        "The study cifar10-mlp-dropout as it is (a perceptron with 128 hidden units on CIFAR-10, "
        "Adam at learning rate 0.0001, batches of 32, 50 epochs), with a fourth arm that has both. "
        "Quick: 1 epoch, which is too soon for a network to overfit."
    ),
    # The study's own margin: of networks that are right every second time, a point is of no use.
    # It is in the number already, so nothing is left to be small against.
    parts=tuple(Part(name, "more", 0.0, "points") for name in _PARTS),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "One learning rate for all four, that of the tutorial; and one strength of dropout, after "
        "a single hidden layer."
    ),
)
