"""Charts of what happened inside the networks: what norms learned, and what probes read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from normlab.report.charts import arm_shape, colors
from normlab.statistics import mean_interval
from normlab.study import Comparison
from normlab.training import Replica

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["inside_charts"]

_SPREAD = (0.05, 0.95)  # Of channels, in the charts of γ and β.
_LEARNED = {"gamma": ("weight", "γ of the norms"), "beta": ("bias", "β of the norms")}


class _Course(NamedTuple):
    """A chart of what a probe read.

    Attributes:
        probe: Its name.
        names: Of its numbers: the lines.
        title: Of the chart.
        y: Of the axis.
        scale: `linear`, `share`, or `log`, whose means are geometric.
    """

    probe: str
    names: tuple[str, ...]
    title: str
    y: str
    scale: str = "linear"


_COURSES = {
    "activation-percentiles": _Course(
        "percentiles",
        ("q15", "q50", "q85"),
        "What activations get: 15th, 50th and 85th percentiles",
        "input of the activation",
    ),
    "unit-percentiles": _Course(
        "percentiles",
        ("unit.q15", "unit.q50", "unit.q85"),
        "What the first unit of each activation gets: 15th, 50th and 85th percentiles",
        "input of the activation",
    ),
    "output-gradients": _Course(
        "gradients", ("output",), "Gradients by what layers return", "‖∂L/∂h‖² a sample", "log"
    ),
    "weight-gradients": _Course(
        "gradients", ("weight",), "Gradients by the weights of layers", "‖∂L/∂w‖", "log"
    ),
    "dead-units": _Course(
        "units", ("dead",), "Units of ReLUs that are always zero", "share of units", "share"
    ),
    "saturated-units": _Course(
        "units",
        ("saturated",),
        "Units of sigmoids and tanhs that are almost always on the flat parts",
        "share of units",
        "share",
    ),
    "loss-range": _Course(
        "smoothness",
        ("loss.range",),
        "How much the loss varies along the gradient, up to 4 learning rates away",
        "max L − min L",
        "log",
    ),
    "relative-loss-range": _Course(
        "smoothness",
        ("relative.loss.range",),
        "How much the loss varies along the gradient, up to a tenth of the weights' length away",
        "max L − min L",
        "log",
    ),
    "gradient-change": _Course(
        "smoothness",
        ("gradient.change",),
        "How much the gradient changes along itself, up to 4 learning rates away",
        "max ‖g(w − ηg) − g(w)‖",
        "log",
    ),
    "relative-gradient-change": _Course(
        "smoothness",
        ("relative.gradient.change",),
        "How much the gradient changes along itself, up to a tenth of the weights' length away",
        "max ‖g(w − ηg) − g(w)‖",
        "log",
    ),
    "gradient-shift": _Course(
        "covariate-shift",
        ("shift",),
        "How much a layer's gradient moves when the layers before it take their step",
        "‖G − G′‖",
        "log",
    ),
    "gradient-cosine": _Course(
        "covariate-shift",
        ("cosine",),
        "Whether a layer's gradient keeps its direction when the layers before it take their step",
        "cosine of G and G′",
    ),
}


def inside_charts(comparison: Comparison) -> dict[str, alt.TopLevelMixin]:
    """Draw what happened inside the networks, of the runs that finished, at the reported setting.

    Args:
        comparison: What to draw.

    Returns:
        By name: `gamma` and `beta`, from the histograms that every study keeps, and of each probe
        of the study its charts, with a panel for each layer and a colour for each arm. Only those
        that have something to show.
    """
    charts = {}
    histograms = _reported(comparison, comparison.histograms())
    for key, (name, title) in _LEARNED.items():
        learned = histograms.loc[histograms["name"] == name]
        if len(learned):
            band = "band: 5 to 95% of the channels of all seeds; from histograms of 30 bins"
            subtitle = f"mean over channels of {_seeds(learned)}; {band}"
            charts[key] = _draw(comparison, _pooled(learned), title, title[0], subtitle)
    probed = _reported(comparison, comparison.probes()) if comparison.study.probes else None
    for key, course in _COURSES.items():
        if probed is None:
            break
        read = probed.loc[(probed["probe"] == course.probe) & probed["name"].isin(course.names)]
        if course.scale == "log":
            read = read.loc[read["value"] > 0]
        if len(read):
            charts[key] = _course(comparison, course, read)
    return charts


def _reported(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of replicas that finished, at the setting that stands for their arm."""
    ends = comparison.replicas()
    ends = ends.loc[ends["status"] == "done", list(Replica._fields)]
    kept = [(arm, *setting) for arm, setting in comparison.reported.items()]
    keys = zip(ends["arm"], ends["lr"], ends["weight_decay"], strict=True)
    return frame.merge(ends.loc[[key in kept for key in keys]], on=list(Replica._fields))


def _seeds(frame: pd.DataFrame) -> str:
    count = frame["seed"].nunique()
    return f"{count} seed{'s' * (count != 1)}"


def _pooled(histograms: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the spread of the channels of all seeds, to the width of a bin."""
    import pandas as pd

    rows = []
    for (arm, layer, step), group in histograms.groupby(["arm", "layer", "step"], sort=False):
        counts = np.array(group["counts"].tolist())
        low, width = (
            each.to_numpy()[:, None] for each in (group["low"], group["high"] - group["low"])
        )
        values = (low + width * (np.arange(counts.shape[1]) + 0.5) / counts.shape[1]).ravel()
        order, counts = values.argsort(), counts.ravel()
        shares = counts[order].cumsum() / counts.sum()
        ends = values[order][np.searchsorted(shares, _SPREAD)]
        mean = float(values @ counts / counts.sum())
        rows.append((arm, layer, "", step, mean, *map(float, ends), len(group)))
    return pd.DataFrame(rows, columns=["arm", "layer", "line", "step", "mean", "low", "high", "n"])


def _course(comparison: Comparison, course: _Course, read: pd.DataFrame) -> alt.TopLevelMixin:
    is_log = course.scale == "log"
    data = _means(read, comparison.study.confidence, is_log)
    mean = "geometric mean" if is_log else "mean"
    band = f"band: pointwise {comparison.study.confidence * 100:g}% t interval of the mean"
    subtitle = f"{mean} of {_seeds(read)}; {band}"
    return _draw(comparison, data, course.title, course.y, subtitle, course.scale)


def _means(read: pd.DataFrame, confidence: float, is_log: bool) -> pd.DataFrame:
    """Return the mean over seeds of each number at each step, with its interval."""
    import pandas as pd

    values = np.log10(read["value"]) if is_log else read["value"]
    cells = read.assign(line=read["name"].str.removeprefix("unit."), value=values)
    wide = cells.pivot(index=["arm", "layer", "line", "step"], columns="seed", values="value")
    parts = []
    # Together those that the same seeds have; nearly always that is all of them.
    for there, part in wide.groupby([wide[seed].notna() for seed in wide]):
        ends = mean_interval(part.to_numpy()[:, np.array(there)], axis=1, confidence=confidence)
        mean, low, high = (10**each if is_log else each for each in ends)
        found = part.index.to_frame(index=False).assign(mean=mean, low=low, high=high)
        parts.append(found.assign(n=sum(there)))
    return pd.concat(parts).sort_values(["arm", "layer", "line", "step"], ignore_index=True)


def _draw(
    comparison: Comparison, data: pd.DataFrame, title: str, y: str, subtitle: str, scale: str = ""
) -> alt.TopLevelMixin:
    """Draw lines with bands over epochs, a panel for each layer."""
    import altair as alt

    shown = set(data["arm"])  # An arm without a norm has no γ.
    palette = {arm: color for arm, color in colors(comparison).items() if arm in shown}
    of_line = data.groupby(["arm", "layer", "line"])["step"]
    data = data.assign(
        layer=data["layer"].replace("", "the whole network"),
        epochs=data["step"] / max(comparison.steps_per_epoch, 1),
        ends=data["step"] == of_line.transform("max"),
    )
    several = data["line"].nunique() > 1
    more: dict[str, Any] = {"detail": "line:N"} if several else {}
    base = alt.Chart(data).encode(
        x=alt.X("epochs:Q", title="epoch"),
        color=alt.Color(
            "arm:N",
            scale=alt.Scale(domain=list(palette), range=list(palette.values())),
            legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
        ),
        **more,
    )
    if several:  # The middle one is whole.
        dash = alt.Scale(domain=["q15", "q50", "q85"], range=[[4, 3], [1, 0], [4, 3]])
        more = {"strokeDash": alt.StrokeDash("line:N", scale=dash, legend=None)}
    kind: dict[str, Any] = {"type": "log"} if scale == "log" else {"zero": scale == "share"}
    axis = alt.Axis(format="%") if scale == "share" else alt.Axis()
    line = base.mark_line().encode(
        y=alt.Y("mean:Q", title=y, scale=alt.Scale(**kind), axis=axis),
        tooltip=[
            *("arm:N", "layer:N", *(["line:N"] if several else [])),
            alt.Tooltip("step:Q", format=","),
            *(alt.Tooltip(f"{each}:Q", format=".4~g") for each in ("mean", "low", "high")),
            alt.Tooltip("n:Q", title="seeds"),
        ],
        **more,
    )
    # The shape tells arms apart without colours, and a line of one point is seen by it.
    end = (
        line.transform_filter("datum.ends")
        .mark_point(filled=True, size=30, opacity=1)
        .encode(shape=arm_shape(comparison.study.arms, shown))
    )
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2="high:Q")
    return (
        alt.layer(band, line, end)
        .properties(width=200, height=150)
        .facet(facet=alt.Facet("layer:N", title=None, sort=_in_order(comparison, data)), columns=3)
        .properties(title=alt.TitleParams(title, subtitle=subtitle, anchor="start"))
    )


def _in_order(comparison: Comparison, data: pd.DataFrame) -> list[str]:
    """Return the layers that are shown, in the order of the pass."""
    by_arm = comparison.layers().groupby("arm")["layer"].apply(list)
    places: dict[str, int] = {}
    # From the arm with the most layers, in which those that others lack have their places.
    for layer in (layer for layers in sorted(by_arm, key=len, reverse=True) for layer in layers):
        places.setdefault(layer, len(places))
    shown = data["layer"].unique().tolist()
    # A second call of a layer, which has its number behind the name, comes with its first.
    return sorted(shown, key=lambda name: (places.get(name.split(" (")[0], len(places)), name))
