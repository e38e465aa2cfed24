"""Batch norm changes the speed of training, and not the accuracy that it ends with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import points
from normlab.claims.outcomes import Rows, ends, merged
from normlab.claims.setups import alone, tutorial
from normlab.claims.work import Work
from normlab.report.charts import PALETTE

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_STUDIES = (
    "mnist-mlp-sgd",
    "mnist-mlp-adam",
    "mnist-solver",
    "cifar10-mlp-dropout",
    "fashion-lenet-sigmoid",
)
_MARGIN = 0.5
_SAID = (1.0, 2.0)  # What one of the tutorials saw, in points.
_METRIC = "best_validation_test_accuracy"


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    rows = merged(_ends(work, name) for name in _STUDIES)
    for seed in work.seeds:
        yield seed, rows[seed]


def _ends(work: Work, name: str) -> Rows:
    """Return the accuracies in one study of its batch norm and of the plain network."""
    study = tutorial(name, work.quick)
    parts = [study]
    if "plain" not in study.arms:
        # The full study may be trained already; a quick one is cheaper without torch's layer.
        parts = [study, alone(study, "plain")]
        if work.quick:
            parts = [study.with_fields({"arms": ("plain", "batch")})]
    rows = merged(ends(work.compare(part), {_METRIC: name}) for part in parts)
    return {
        seed: [row for row in some if row.arm in ("plain", "batch")] for seed, some in rows.items()
    }


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {name: points(frame, name, "batch", "plain") for name in _STUDIES}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import altair as alt
    import pandas as pd

    differences = pd.DataFrame(
        [
            {"study": name, "seed": seed, "points": value}
            for name, values in _effects(frame).items()
            for seed, value in zip(sorted(frame["seed"].unique()), values, strict=True)
            if math.isfinite(value)
        ],
        columns=["study", "seed", "points"],
    )
    # From parts of a point to dozens.
    scale = alt.Scale(type="symlog", constant=1)
    places = [-50, -20, -10, -5, -2, -1, -_MARGIN, 0, _MARGIN, 1, 2, 5, 10, 20, 50]
    axis = alt.Axis(values=places, format="~g")
    x = alt.X("points:Q", title="batch − plain, points of accuracy", scale=scale, axis=axis)
    spans = pd.DataFrame(
        [
            {"said": f"no difference (±{_MARGIN:g})", "from": -_MARGIN, "to": _MARGIN},
            {"said": "one to two points", "from": _SAID[0], "to": _SAID[1]},
        ]
    )
    said = (
        alt.Chart(spans)
        .mark_rect(opacity=0.25)
        .encode(
            x=alt.X("from:Q", scale=scale, title=""),
            x2="to:Q",
            color=alt.Color(
                "said:N",
                scale=alt.Scale(domain=list(spans["said"]), range=[PALETTE[0], PALETTE[5]]),
                legend=alt.Legend(title="what is said", orient="top"),
            ),
        )
    )
    base = alt.Chart(differences).encode(y=alt.Y("study:N", title=None, sort=list(_STUDIES)))
    seeds = base.mark_point(filled=True, size=45, opacity=0.55, color=PALETTE[1]).encode(
        x=x, tooltip=["study", "seed", "points"]
    )
    mean = base.mark_tick(thickness=3, size=28, color=PALETTE[1]).encode(
        x=alt.X("mean(points):Q", scale=scale)
    )
    title = "What batch norm brings in accuracy, study by study"
    subtitle = "dots: seeds; stroke: their mean"
    if failed := len(_STUDIES) * frame["seed"].nunique() - len(differences):
        subtitle += f"; not shown: {failed} in which a replica diverged"
    return alt.layer(said, seeds, mean).properties(
        width=480,
        height=alt.Step(40),
        title=alt.TitleParams(title, subtitle=subtitle, anchor="start"),
    )


CLAIM = Claim(
    name="accuracy",
    statement="Batch norm changes how fast a network trains, and not how accurate it ends.",
    source="Said in tutorials, without a measurement",
    metric=(
        "Test accuracy of batch − plain at the epoch that is best on validation data, in points: "
        "of a training that is not at its end, or beyond it, the last accuracy is not the final "
        "one."
    ),
    published="Of mnist-mlp-adam its tutorial says the contrary, one to two points more; one seed.",
    setup=(
        "The five studies that come with normlab, as they are, each at its text's own learning "
        "rate and length: perceptrons on MNIST (5 epochs with SGD, 10 with Adam, twice) and on "
        "CIFAR-10 (50 epochs), and LeNet with sigmoids on Fashion-MNIST (10 epochs; the plain "
        "network in a study of its own). Quick: 1, 2, 2, 1 and 2 epochs."
    ),
    # Declared in the design: half of the least that the other belief says.
    parts=tuple(Part(name, "equal", _MARGIN, "points") for name in _STUDIES),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "The other belief is that batch norm is one to two points more accurate; no study can bear "
        "out both. These trainings are not tuned: another learning rate may suit either network "
        "better, and longer training may close a gap. So this is about these trainings at their "
        "length, and not about networks that are trained until nothing more is gained."
    ),
)
