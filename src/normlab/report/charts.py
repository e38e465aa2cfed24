"""Charts: the same ones interactive, as SVG and as PNG."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from normlab.errors import InputError
from normlab.report.sensitivity import sensitivity_chart
from normlab.report.wording import sentence
from normlab.study import Comparison

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    import altair as alt
    import pandas as pd

__all__ = [
    "CHARTS",
    "DARK",
    "PALETTE",
    "SPLITS",
    "arm_shape",
    "chart",
    "colors",
    "curve_rows",
    "draw_curves",
    "palette",
    "with_something_to_show",
]

CHARTS = {
    "accuracy": "Accuracy",
    "loss": "Loss",
    "difference": "Difference in final test accuracy, seed by seed",
    "sensitivity": "Accuracy against the learning rate",
}
"""The charts that `chart` draws, with their titles."""

# The baseline in grey; then Okabe and Ito's colours, which differ for every kind of colour vision,
# three of them darker than theirs. On white each has a contrast above 3, and so has each colour for
# a dark page there.
DARK = {
    "#6b7280": "#9ca3af",
    "#0072b2": "#4ba3e3",
    "#d55e00": "#f08a3c",
    "#009e73": "#2fc494",
    "#cc79a7": "#e39cc4",
    "#b07800": "#f0c04a",
    "#2c8fc9": "#8fd0f5",
    "#8c564b": "#c99287",
    "#7f3fbf": "#b58ae6",
    "#8a7d00": "#d6c94a",
}
"""The colours of arms, each with the one that a dark page shows in its place."""
PALETTE = tuple(DARK)
"""The colours of arms, the baseline's first."""

# Colour is never the only thing that tells two arms apart.
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
SPLITS = {"train": "training", "validation": "validation", "test": "test"}
"""The data that curves are drawn for, as people call them."""


def colors(comparison: Comparison) -> dict[str, str]:
    """Return the colour of each arm, the same in every chart and table."""
    return palette(comparison.study.arms)


def palette(arms: tuple[str, ...]) -> dict[str, str]:
    """Return a colour for each arm, the baseline's first."""
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}


def chart(comparison: Comparison, name: str = "accuracy") -> alt.TopLevelMixin:
    """Draw a comparison.

    Args:
        comparison: What to draw.
        name: `accuracy` or `loss` for curves over epochs with pointwise bands, one panel a split;
            `difference` for the differences in final test accuracy with their interval;
            `sensitivity` for final test accuracy against the learning rate, and the range that
            works for each arm.

    Returns:
        An Altair chart.

    Raises:
        InputError: There is no such chart.
    """
    if name not in CHARTS:
        raise InputError(f"unknown chart {name!r}: known are {', '.join(CHARTS)}")
    if name == "difference":
        return _differences(comparison)
    if name == "sensitivity":
        arms = colors(comparison)
        return sensitivity_chart(comparison, _arm_color(arms), arm_shape(arms), CHARTS[name])
    return _curves(comparison, name)


def with_something_to_show(comparison: Comparison) -> list[str]:
    """Return the names of `CHARTS`, without those that one arm or one rate leaves nothing for."""
    alone = {
        "difference": len(comparison.study.arms) == 1,
        "sensitivity": len(comparison.study.lr) == 1,
    }
    return [name for name in CHARTS if not alone.get(name)]


def _curves(comparison: Comparison, metric: str) -> alt.TopLevelMixin:
    import altair as alt

    data = curve_rows(comparison, metric)
    counts = sorted({data["n"].min(), data["n"].max()}) if len(data) else [0]
    n = "–".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    subtitle = [f"mean of {n}; band: {data.attrs['band']}", *_what_is_not_in_it(comparison)]
    ends = _ends(data, metric, comparison.study.arms)
    shown = [name for name in SPLITS.values() if name in set(data["split"])]
    layers = draw_curves(data, metric, colors(comparison), comparison.study.epochs)
    return (
        layers.properties(width=250, height=230)
        .facet(column=alt.Column("split:N", title=None, sort=shown))
        .properties(
            title=alt.TitleParams(CHARTS[metric], subtitle=subtitle, anchor="start"),
            description=f"{CHARTS[metric]} over epochs, {ends}; {subtitle[0]}.",
        )
    )


def curve_rows(comparison: Comparison, metric: str) -> pd.DataFrame:
    """Return what the curves of a metric are drawn from.

    Returns:
        `Comparison.curves`, of each arm at the setting that it is reported at, with the columns
        `epochs`, fractions too, and `seconds` of training to that step: the mean time of a step
        of the replicas that finished, evaluation included, times the steps.
    """
    curves = comparison.curves(metric)
    kept = {(arm, *setting) for arm, setting in comparison.reported.items()}
    curves = curves.loc[curves["split"].isin(SPLITS)]
    keys = list(zip(curves["arm"], curves["lr"], curves["weight_decay"], strict=True))
    curves = curves.loc[[key in kept for key in keys]]
    done = comparison.replicas().query("status == 'done' and step > 0")
    paces = (done["seconds"] / done["step"]).groupby(
        [done["arm"], done["lr"], done["weight_decay"]]
    )
    pace = paces.mean().to_dict()
    return curves.assign(
        split=curves["split"].map(SPLITS),
        epochs=curves["step"] / max(comparison.steps_per_epoch, 1),
        seconds=[pace[key] for key in keys if key in kept] * curves["step"],
    )


def draw_curves(
    data: pd.DataFrame, metric: str, palette: Mapping[str, str], epochs: int
) -> alt.LayerChart:
    """Draw bands, lines and points of `curve_rows`, to be set in panels."""
    import altair as alt

    every = -(-epochs // 10)  # Ten labels at most, and whole epochs only.
    picked = alt.selection_point(fields=["arm"], bind="legend")
    number = ".2%" if metric == "accuracy" else ".4f"
    base = alt.Chart(data).encode(
        x=alt.X(
            "epochs:Q",
            title="epoch",
            axis=alt.Axis(values=list(range(every, epochs + 1, every)), format="d"),
        ),
        color=_arm_color(palette),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.15)),
    )
    area = base.mark_area().encode(
        y=alt.Y("low:Q"),
        y2="high:Q",
        opacity=alt.condition(picked, alt.value(0.2), alt.value(0.05)),
    )
    line = base.encode(
        y=alt.Y(
            "mean:Q",
            title=metric,
            scale=alt.Scale(zero=False),
            axis=alt.Axis(format="%" if metric == "accuracy" else "~g"),
        ),
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("lr:Q"),
            alt.Tooltip("weight_decay:Q"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("epoch:Q", title="epochs finished"),
            alt.Tooltip("mean:Q", format=number),
            alt.Tooltip("low:Q", format=number),
            alt.Tooltip("high:Q", format=number),
            alt.Tooltip("n:Q", title="seeds"),
            alt.Tooltip("diverged:Q"),
        ],
    )
    points = line.mark_point(filled=True, size=30).encode(shape=arm_shape(palette))
    return alt.layer(area, line.mark_line(), points).add_params(picked)


def _ends(data: pd.DataFrame, metric: str, arms: tuple[str, ...]) -> str:
    """Return the last means in words, for those who do not see the chart."""
    test = data.loc[data["split"] == SPLITS["test"]].sort_values("step", kind="stable")
    last = dict(zip(test["arm"], test["mean"], strict=True))
    if not last:
        return "with nothing to draw yet"
    form = "{:.2%}" if metric == "accuracy" else "{:.4f}"
    means = ", ".join(f"{arm} {form.format(last[arm])}" for arm in arms if arm in last)
    return f"at the end on test data {means}"


def _what_is_not_in_it(comparison: Comparison) -> list[str]:
    """Return what the curves leave out: replicas that diverged, and other settings."""
    lines, reported = [], comparison.reported
    diverged = comparison.diverged()
    gone = [
        f"{arm} {diverged[arm, setting]} of {len(comparison.study.seeds)}"
        for arm, setting in reported.items()
        if diverged[arm, setting]
    ]
    if gone:
        lines.append(f"diverged, and not in the mean: {', '.join(gone)}")
    if len(comparison.study.settings) > 1:
        shown = "; ".join(f"{arm} {setting}" for arm, setting in reported.items())
        lines.append(f"shown: {shown}")
    return lines


def _differences(comparison: Comparison) -> alt.TopLevelMixin:
    import altair as alt
    import pandas as pd

    metric = comparison.metrics[0]
    baseline = comparison.study.baseline
    others = [arm for arm in comparison.study.arms if arm != baseline]
    finals = comparison.outcomes()[metric.name].unstack("arm")
    rows = [
        {"arm": arm, "seed": seed, "difference": (row[arm] - row[baseline]) * 100}
        for seed, row in finals.iterrows()
        for arm in others
    ]
    pairs = pd.DataFrame(rows, columns=["arm", "seed", "difference"])
    seeds = pairs.dropna()
    missing = [
        f"{arm} {gone} of {len(finals)} seeds"
        for arm, gone in pairs["difference"].isna().groupby(pairs["arm"], sort=False).sum().items()
        if gone
    ]
    means = pd.DataFrame(
        [
            {
                "arm": one.arm,
                "mean": one.difference * 100,
                "low": one.interval[0] * 100,
                "high": one.interval[1] * 100,
            }
            for one in comparison.verdicts
            if one.metric.name == metric.name and one.difference is not None and one.interval
        ],
        columns=["arm", "mean", "low", "high"],
    )
    margin = comparison.study.margin_accuracy * 100
    zone = pd.DataFrame([{"from": -margin, "to": margin, "zero": 0.0}])
    y = alt.Y("arm:N", title=None, sort=others)
    color = _arm_color(colors(comparison), legend=False)
    x = alt.X("difference:Q", title=f"points of accuracy, against {baseline}")
    inside = alt.Chart(zone).mark_rect(color="#9ca3af", opacity=0.25).encode(x="from:Q", x2="to:Q")
    zero = alt.Chart(zone).mark_rule(color="#6b7280").encode(x="zero:Q")
    ticks = (
        alt.Chart(seeds)
        .mark_point(filled=True, size=45, opacity=0.55)
        .encode(
            x=x,
            y=y,
            color=color,
            tooltip=["arm:N", "seed:Q", alt.Tooltip("difference:Q", format="+.2f")],
        )
    )
    bars = alt.Chart(means).encode(y=y, color=color)
    span = bars.mark_rule(strokeWidth=3, yOffset=14).encode(x=alt.X("low:Q"), x2="high:Q")
    mean = bars.mark_point(filled=True, shape="diamond", size=110, yOffset=14, opacity=1).encode(
        x="mean:Q",
        tooltip=[
            "arm:N",
            *(alt.Tooltip(f"{key}:Q", format="+.2f") for key in ("mean", "low", "high")),
        ],
    )
    subtitle = (
        f"dots: seeds; diamond and bar: mean and {comparison.study.confidence * 100:g}% interval; "
        f"grey: differences declared not to matter (±{margin:g})"
    )
    return alt.layer(inside, zero, ticks, span, mean).properties(
        width=620,
        height=alt.Step(56),
        title=alt.TitleParams(
            CHARTS["difference"],
            subtitle=[subtitle, f"without one, as a replica diverged: {', '.join(missing)}"]
            if missing
            else subtitle,
            anchor="start",
        ),
        description=f"{CHARTS['difference']}. "
        + " ".join(sentence(one) for one in comparison.verdicts if one.metric.name == metric.name),
    )


def _arm_color(palette: Mapping[str, str], *, legend: bool = True) -> alt.Color:
    import altair as alt

    return alt.Color(
        "arm:N",
        scale=alt.Scale(domain=list(palette), range=list(palette.values())),
        legend=_legend() if legend else None,
    )


def arm_shape(arms: Iterable[str], shown: Container[str] | None = None) -> alt.Shape:
    """Return the shapes of arms' points, which tell them apart where colours do not.

    Args:
        arms: Of the study.
        shown: Those of them that the chart has; all for None.
    """
    import altair as alt

    shapes = dict(zip(arms, cycle(_SHAPES), strict=False))
    kept = {arm: shape for arm, shape in shapes.items() if shown is None or arm in shown}
    scale = alt.Scale(domain=list(kept), range=list(kept.values()))
    return alt.Shape("arm:N", scale=scale, legend=_legend())


def _legend() -> alt.Legend:
    import altair as alt

    return alt.Legend(title=None, orient="top", symbolOpacity=1)
