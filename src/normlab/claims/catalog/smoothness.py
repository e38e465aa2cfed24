"""How much the loss varies on the way along its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import contrast, of_arm
from normlab.claims.readings import readings
from normlab.claims.setups import fashion_inside
from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_ARMS = ("plain", "batch")
_STEPS = {
    "loss.range": "steps in learning rates",
    "relative.loss.range": "steps in lengths of the weights",
}
_RANGE = "log₂(max L − min L)"
# By less than a factor of √2 the published bands would seem to lie on each other.
_MARGIN = 0.5


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    comparison = work.compare(fashion_inside(work.quick))
    found = [
        readings(comparison, "smoothness", name, kind, log=True) for name, kind in _STEPS.items()
    ]
    for seed in work.seeds:
        yield seed, [row for rows in found for row in rows[seed]]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    effects = {}
    for kind in _STEPS.values():
        plain, batch = (of_arm(frame, arm, kind, np.mean) for arm in _ARMS)
        effects[kind] = contrast(plain, batch, failed=math.inf)
    return effects


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import altair as alt

    return alt.vconcat(
        *(
            lines(
                frame[frame["quantity"] == kind],
                title=f"Variation of the loss along its gradient, {kind}",
                x="step",
                y=_RANGE,
                arms=_ARMS,
            )
            for kind in _STEPS.values()
        )
    )


CLAIM = Claim(
    name="smoothness",
    statement="With batch norm the loss varies less along its gradient.",
    source="Santurkar, Tsipras, Ilyas and Mądry, 2018",
    metric=f"{_RANGE} of L(w − ηg) over five η, without batch norm − with it, mean over steps: η "
    "from 0.1 to 4 learning rates, and η for which η‖g‖/‖w‖ goes from 0.0001 to 0.1.",
    published="Less with batch norm in a plot, of steps in learning rates alone, and no figure.",
    setup="Fashion-MNIST, 55,000 training images, a perceptron of 4×128 ReLUs, batch 128, SGD at "
    "the rate 0.1, five epochs; read every 65 steps on 128 training images, in training mode. "
    "Quick: 15,000 images, two epochs, read every 26 steps.",
    parts=tuple(Part(kind, "more", _MARGIN, "doublings") for kind in _STEPS.values()),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement="Weights before a batch norm can be made larger, and nothing else changes but "
    "that their gradients become smaller: so steps in learning rates, which the authors took, tell "
    "of the weights' size too, and steps in lengths of the weights do not.",
)
