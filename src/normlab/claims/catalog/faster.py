"""Batch norm trains in fewer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import doublings
from normlab.claims.outcomes import course, ends, merged
from normlab.claims.setups import mnist_sigmoid
from normlab.claims.work import Work
from normlab.study import Study

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_STEPS = "steps to 95% test accuracy"
_COURSE = "test accuracy"
_PART = "log2(steps of plain / steps of batch)"


def _study(quick: bool) -> Study:
    fields = {
        "name": "mnist-sigmoid-rates",
        "lr": (1.0, 3.0) if quick else (0.3, 1.0, 3.0, 10.0),
        "epochs": 4 if quick else 6,
        # An epoch has 916 steps; looking at all images costs as much as some hundreds of them.
        "evaluate_every": 458 if quick else 229,
    }
    return mnist_sigmoid(quick).with_fields(fields)


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    comparison = work.compare(_study(work.quick))
    rows = merged([ends(comparison, {"steps_to_target": _STEPS}), course(comparison, _COURSE)])
    for seed in work.seeds:
        yield seed, rows[seed]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {_PART: doublings(frame, _STEPS, "batch", "plain")}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame[frame["quantity"] == _COURSE],
        title="How soon test accuracy gets to 95%, each network at its own learning rate",
        x="steps",
        y=_COURSE,
        arms=["plain", "batch"],
        expected=0.95,
    )


CLAIM = Claim(
    name="faster",
    statement="A network with batch norm gets to the same accuracy in fewer steps.",
    source="Ioffe and Szegedy, 2015",
    metric=f"{_PART}: doublings of the steps until test accuracy is 95% for the first time.",
    published="On ImageNet 31.0 million steps without and 13.3 million with it, 1.22 doublings.",
    setup=(
        "MNIST, a perceptron with three hidden layers of 100 sigmoids, SGD, batches of 60, 5,496 "
        "steps, evaluated every 229; learning rates 0.3, 1, 3 and 10, each arm at the one with the "
        "best final validation accuracy over the other seeds. Quick: 3,664 steps, every 458, rates "
        "1 and 3."
    ),
    # A step with batch norm takes about a quarter longer, so log2(1.25) are lost again.
    parts=(Part(_PART, "more", 0.32, "doublings"),),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "Each arm's learning rate is the one that ends best, which need not be the one that gets "
        "to 95% first."
    ),
)
