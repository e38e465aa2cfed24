"""What learning rates do to each arm, in words and drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from normlab.study import Comparison

if TYPE_CHECKING:
    import altair as alt

__all__ = ["chosen_sentence", "range_sentences", "sensitivity_chart"]

_ENDS = ("mean", "low", "high")
_WIDTH = 620
_LINE = 125  # Characters that fit above a chart of this width.
# Accuracy is drawn by the error on a logarithmic scale: a point counts near the best, where ranges
# are decided, and not where training failed. What has no error would lie nowhere on it.
_LEAST_ERROR = 1e-4
_TICKS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.07,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.7,
    1.0,
)


def range_sentences(comparison: Comparison) -> list[str]:
    """Return the range of rates that works for each arm, a sentence each.

    Nothing of a study of one rate, and nothing before a seed is finished.
    """
    ranges = comparison.ranges().to_dict("records")
    if len(comparison.study.lr) == 1 or not ranges:
        return []
    baseline = ranges[0]
    sentences = [
        _range(one) + (_against(one, baseline, comparison) if one is not baseline else "") + "."
        for one in ranges
    ]
    if not comparison.complete:
        finished, seeds = baseline["n"], len(comparison.study.seeds)
        sentences.append(f"So far, from the {finished} of {seeds} seeds that are finished.")
    return sentences


def chosen_sentence(comparison: Comparison) -> str:
    """Return the rates and weight decays that arms are reported at, with how many seeds are.

    It is empty of a study of one setting, and before a seed is finished.
    """
    settings = comparison.study.settings
    if len(settings) == 1 or not any(comparison.chosen.values()):
        return ""
    told = []
    for arm, chosen in comparison.chosen.items():
        counts = Counter(chosen.values())
        each = [f"{one} ({counts[one]} of {len(chosen)})" for one in settings if counts[one]]
        told.append(f"{arm} {', '.join(each)}")
    return f"Chosen on validation data, for each seed by the others: {'; '.join(told)}."


def _range(one: Mapping[Hashable, Any]) -> str:
    if math.isnan(one["best"]):
        return f"{one['arm']} has no range of learning rates: every replica diverged"
    span = "at that rate alone"
    if one["low"] < one["high"]:
        span = f"from {one['low']:g} to {one['high']:g}"
    return (
        f"{one['arm']} is within a point of its best final test accuracy, {one['best']:.2%} at lr "
        f"{one['best_lr']:g}, {span} ({_width(one)}{_open(one)})"
    )


def _width(one: Mapping[Hashable, Any]) -> str:
    number = f"{one['decades']:.2f}".rstrip("0").rstrip(".")
    return f"{number} decade{'s' * (number != '1')}"


def _open(one: Mapping[Hashable, Any]) -> str:
    ends = [word for word, end in (("begin", "low"), ("end", "high")) if one[f"open_{end}"]]
    return f" or more: the rates tried {' and '.join(ends)} there" if ends else ""


def _against(
    one: Mapping[Hashable, Any], baseline: Mapping[Hashable, Any], comparison: Comparison
) -> str:
    """Return the difference to the baseline, which is over seeds, each with a range of its own."""
    ours, theirs, n = one["arm"], baseline["arm"], one["n"]
    if one["without"] or baseline["without"]:
        return (
            f"; not compared with {theirs}'s: in {one['without']} of {n} seeds every replica of "
            f"{ours} diverged, in {baseline['without']} every one of {theirs}"
        )
    seeds = f"{n} seed{'s' * (n != 1)}"
    if not math.isnan(one["difference_low"]):
        low, high = (_signed(one[f"difference_{end}"]) for end in ("low", "high"))
        seeds = f"{comparison.study.confidence * 100:g}% interval {low} to {high}; {seeds}"
    elif n > 1:
        seeds = f"the same in all {seeds}"
    difference = _signed(one["difference"])
    return (
        f"; each seed's own range against {theirs}'s, in the rates tried: {difference} decades on "
        f"average ({seeds})"
    )


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")


def sensitivity_chart(
    comparison: Comparison, color: alt.Color, shape: alt.Shape, title: str
) -> alt.TopLevelMixin:
    """Draw accuracy against the learning rate, and below it the range that works for each arm.

    Args:
        comparison: What to draw.
        color: Of the arms.
        shape: Of the arms.
        title: Above it.
    """
    import altair as alt

    frame = comparison.sensitivity()
    seeds = max(frame["n"], default=0)
    said = [
        f"lines: mean final test accuracy of {seeds} seed{'s' * (seeds != 1)}; band: "
        f"{frame.attrs['band']}",
        "a replica that diverged counts as accuracy 0; such rates have a cross, how many diverged, "
        "and no band",
        "bars: the widest range within a point of an arm's best (dot); an arrow: the rates tried "
        "end there",
        "diamond: the rate that most seeds are reported at",
    ]
    sentences = range_sentences(comparison)
    # The space at the end of a line that goes on tells the page's script so.
    broken = [wrap(one, _LINE, break_on_hyphens=False) for one in sentences]
    ranges = [line for lines in broken for line in " \n".join(lines).split("\n")]
    return (
        alt.vconcat(_accuracies(comparison, color, shape), _bars(comparison, color), spacing=14)
        .resolve_scale(x="shared")
        .properties(
            title=alt.TitleParams(title, subtitle=[*said, *ranges], anchor="start"),
            description=" ".join([f"{title}.", *sentences]),
        )
    )


def _rate(comparison: Comparison, field: str) -> alt.X:
    """Return the axis that both panels share."""
    import altair as alt

    rates = sorted(comparison.study.lr)
    return alt.X(
        f"{field}:Q",
        title="learning rate",
        scale=alt.Scale(type="log", domain=[rates[0] / 1.6, rates[-1] * 1.6]),
        axis=alt.Axis(values=rates, format="~g"),
    )


def _accuracies(comparison: Comparison, color: alt.Color, shape: alt.Shape) -> alt.LayerChart:
    import altair as alt

    frame, x = comparison.sensitivity(), _rate(comparison, "lr")
    data = frame[frame["split"] == "test"]
    errors = {f"error_{end}": 1 - data[end].clip(0, 1 - _LEAST_ERROR) for end in _ENDS}
    told = data["diverged"].astype(str) + " of " + data["n"].astype(str)
    data = data.assign(**errors, told=told)
    drawn = data[list(errors)].stack()
    ends = (drawn.min(), drawn.max()) if len(drawn) else (_LEAST_ERROR, 1.0)
    y = alt.Y(
        "error_mean:Q",
        title="error",
        scale=alt.Scale(
            type="log", reverse=True, nice=False, domain=[ends[0] / 1.1, ends[1] * 1.1]
        ),
        axis=alt.Axis(
            title="accuracy (errors, log scale)",
            values=_TICKS,
            labelExpr="format(1 - datum.value, '.3~%')",
        ),
    )
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("lr:Q"),
        alt.Tooltip("weight_decay:Q"),
        *(alt.Tooltip(f"{end}:Q", format=".2%") for end in _ENDS),
        alt.Tooltip("n:Q", title="seeds"),
        alt.Tooltip("diverged:Q"),
    ]
    base = alt.Chart(data).encode(x=x, y=y, color=color)
    # Where an end is missing the band is broken; without this it would be drawn across the gap.
    area = base.mark_area(opacity=0.2, invalid="break-paths-filter-domains").encode(
        y="error_low:Q", y2="error_high:Q"
    )
    line = base.mark_line()
    points = base.mark_point(filled=True, size=35, opacity=1).encode(tooltip=tooltip, shape=shape)
    gone = base.transform_filter("datum.diverged > 0")
    cross = gone.mark_point(shape="cross", angle=45, size=160, filled=True, opacity=1)
    count = gone.mark_text(dx=-12, dy=-4, align="right").encode(text="told:N")
    return alt.layer(area, line, points, cross.encode(tooltip=tooltip), count).properties(
        width=_WIDTH, height=260
    )


def _bars(comparison: Comparison, color: alt.Color) -> alt.LayerChart:
    import altair as alt

    ranges = comparison.ranges().dropna(subset=["best"])
    ranges = ranges.assign(
        told=[
            ("≥ " if " or more" in _open(one) else "") + _width(one)
            for one in ranges.to_dict("records")
        ]
    )
    y = alt.Y("arm:N", title=None, sort=list(comparison.study.arms))
    base = alt.Chart(ranges).encode(y=y, color=color)

    def arrow(end: str, shape: str, offset: int) -> alt.Chart:
        return (
            base.transform_filter(f"datum.open_{end}")
            .mark_point(shape=shape, size=130, filled=True, opacity=1, xOffset=offset)
            .encode(x=_rate(comparison, end))
        )

    bar = base.mark_rule(strokeWidth=5, opacity=0.6).encode(x=_rate(comparison, "low"), x2="high:Q")
    best = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=_rate(comparison, "best_lr"),
        tooltip=[
            "arm:N",
            "best_lr:Q",
            alt.Tooltip("best:Q", format=".2%"),
            "low:Q",
            "high:Q",
            alt.Tooltip("decades:Q", format=".2f"),
            *(
                alt.Tooltip(f"{name}:Q", format="+.2f")
                for name in ("difference", "difference_low", "difference_high")
            ),
        ],
    )
    reported = base.mark_point(shape="diamond", size=260, strokeWidth=2, opacity=1).encode(
        x=_rate(comparison, "reported_lr")
    )
    width = base.mark_text(dx=20, align="left").encode(x=_rate(comparison, "high"), text="told:N")
    arrows = arrow("low", "triangle-left", -9), arrow("high", "triangle-right", 9)
    return alt.layer(bar, *arrows, best, reported, width).properties(
        width=_WIDTH, height=alt.Step(34)
    )
