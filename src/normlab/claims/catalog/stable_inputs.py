"""What a sigmoid gets drifts less in the course of training with batch norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import doublings
from normlab.claims.setups import mnist_sigmoid
from normlab.claims.work import Work
from normlab.report.charts import PALETTE
from normlab.statistics import mean_interval
from normlab.study import Comparison, Study

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "drift"]

_LAYER = "hidden2.activation"
_SCOPES = {"a unit": "unit.", "the layer": ""}
"""What the percentiles are of, and how the probe's names for that begin."""
_PERCENTILES = ("q15", "q50", "q85")
_PARTS = {f"log2(drift of plain / drift of batch), {scope}": scope for scope in _SCOPES}
_MOST_PLACES = 120  # On the x axis of the chart; more are not seen.


def _study(quick: bool) -> Study:
    return mnist_sigmoid(quick).with_fields({"probes": ("percentiles",), "probe_every": 100})


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    comparison = work.compare(_study(work.quick))
    rows = _rows(comparison.probes(), _diverged(comparison))
    for seed in work.seeds:
        yield seed, rows[seed]


def _diverged(comparison: Comparison) -> set[tuple[str, int]]:
    ends = comparison.replicas()
    gone = ends[ends["status"] == "diverged"]
    return set(zip(gone["arm"], gone["seed"], strict=True))


def _rows(probes: pd.DataFrame, diverged: set[tuple[str, int]]) -> dict[int, list[Row]]:
    """Return the percentiles and the drifts, by seed; that of a replica that diverged is NaN."""
    rows: dict[int, list[Row]] = {}
    of_layer = probes[(probes["probe"] == "percentiles") & (probes["layer"] == _LAYER)]
    for (arm, seed), group in of_layer.groupby(["arm", "seed"]):
        table = group.pivot(index="step", columns="name", values="value")
        into = rows.setdefault(seed, [])
        for scope, prefix in _SCOPES.items():
            low, middle, high = (table[prefix + name] for name in _PERCENTILES)
            found = math.nan if (arm, seed) in diverged else drift(low, middle, high)
            into.append(Row(arm, f"drift, {scope}", 0, found))
            for name, course in zip(_PERCENTILES, (low, middle, high), strict=True):
                into += [
                    Row(arm, f"{name}, {scope}", step, value) for step, value in course.items()
                ]
    return rows


def drift(low: Sequence[float], middle: Sequence[float], high: Sequence[float]) -> float:
    """Return how far a distribution's middle moved in all, in widths of the distribution.

    Σ |q50(t + 1) − q50(t)| / median of q85(t) − q15(t), over the times at which it was looked at.
    So it does not depend on the scale of the values.

    Args:
        low: The 15th percentile at each time.
        middle: The 50th.
        high: The 85th.

    >>> drift([-1, -1, -2], [0, 1, -1], [1, 2, 2])
    1.0
    """
    path = np.abs(np.diff(np.asarray(middle, dtype=float))).sum()
    return float(path / np.median(np.asarray(high, dtype=float) - np.asarray(low, dtype=float)))


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {
        part: doublings(frame, f"drift, {scope}", "batch", "plain")
        for part, scope in _PARTS.items()
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import altair as alt

    seed = frame["seed"].min()
    n = frame["seed"].nunique()
    unit = _panels(frame[frame["seed"] == seed], "a unit", f"one unit of seed {seed}")
    layer = _panels(frame, "the layer", f"all units: mean of {n} seeds, pointwise 95% interval")
    return alt.vconcat(unit, layer).properties(
        title=alt.TitleParams(
            "What the last layer of sigmoids gets: 15th, 50th and 85th percentile", anchor="start"
        )
    )


def _panels(frame: pd.DataFrame, scope: str, title: str) -> alt.FacetChart:
    import altair as alt
    import pandas as pd

    steps = sorted(frame["at"].unique())
    shown = set(steps[:: max(1, len(steps) // _MOST_PLACES)])
    rows = []
    for name in _PERCENTILES:
        some = frame[(frame["quantity"] == f"{name}, {scope}") & frame["at"].isin(shown)]
        for (arm, step), group in some.groupby(["arm", "at"]):
            mean, low, high = map(float, mean_interval(group["value"].to_numpy()))
            rows.append(
                {"arm": arm, "step": step, "percentile": name, "mean": mean, "low": low}
                | {"high": high}
            )
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("step:Q", title="steps"),
        color=alt.Color(
            "percentile:N",
            scale=alt.Scale(domain=list(_PERCENTILES), range=list(PALETTE[1:4])),
            legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
        ),
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title=""), y2="high:Q")
    line = base.mark_line().encode(y=alt.Y("mean:Q", title="input of the sigmoid"))
    return (
        alt.layer(band, line)
        .properties(width=300, height=180)
        .facet(column=alt.Column("arm:N", title=title, sort=["plain", "batch"]))
    )


CLAIM = Claim(
    name="stable-inputs",
    statement="What sigmoids get drifts less in the course of training with batch norm.",
    source="Ioffe and Szegedy, 2015, figure 1 (b, c)",
    metric=(
        "Drift Σ|q50(t + 1) − q50(t)| / median(q85 − q15) of what the last layer of sigmoids gets, "
        "in training mode: of one unit, as in the figure, and of all; log2(plain / batch)."
    ),
    published="A plot, and no figure.",
    setup=(
        "MNIST, a perceptron with three hidden layers of 100 sigmoids, SGD at learning rate 1 for "
        "both arms, batches of 60, 50,380 steps; percentiles every 100 steps, on the same training "
        "images each time. Quick: 5,496 steps."
    ),
    # The figure is looked at; less than a factor of √2 would not be seen in it.
    parts=tuple(Part(name, "more", 0.5, "doublings") for name in _PARTS),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "This is one meaning of covariate shift. Santurkar and others, 2018, measure another: how "
        "much a layer's gradient changes when the layers before it are updated."
    ),
)
