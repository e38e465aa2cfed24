"""The figures that claims share: lines over something, and numbers seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from normlab.report.charts import PALETTE, palette
from normlab.statistics import mean_interval

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["dots", "lines", "scatter"]


def lines(
    frame: pd.DataFrame,
    *,
    title: str,
    x: str,
    y: str,
    arms: Sequence[str],
    log_x: bool = False,
    log_y: bool = False,
    symlog_x: bool = False,
    expected: float | None = None,
    by: str = "arm",
) -> alt.LayerChart:
    """Draw a value over `at`: the mean over seeds, with the 95% interval of each point.

    On a logarithmic scale of values, that of their logarithms: the interval then stays above zero.

    Args:
        frame: Columns `seed`, `arm`, `quantity`, `at` and `value`; a value that is not finite, or
            not above zero on a logarithmic scale, is left out, and with it its seed at that place:
            the subtitle says of how few seeds a mean then is.
        title: What is shown.
        x: What `at` is.
        y: What the value is.
        arms: In the order of their colours; the first is grey.
        log_x: Whether `at` is shown on a logarithmic scale.
        log_y: Whether the value is.
        symlog_x: Whether `at` is, but for a place at 0.
        expected: Where a line is drawn that a text or a formula gives.
        by: The column whose values the lines are: `arm` or `quantity`.
    """
    import altair as alt
    import numpy as np
    import pandas as pd

    finite = frame[np.isfinite(frame["value"])]
    rows = []
    if log_y:
        finite = finite[finite["value"] > 0]
    for (arm, at), group in finite.groupby([by, "at"]):
        values = group["value"].to_numpy()
        interval = np.exp(mean_interval(np.log(values))) if log_y else mean_interval(values)
        mean, low, high = map(float, interval)
        rows.append({by: arm, "at": at, "mean": mean, "low": low, "high": high, "n": len(group)})
    data = pd.DataFrame(rows, columns=[by, "at", "mean", "low", "high", "n"])
    shades = palette(tuple(arms))
    color = alt.Color(
        f"{by}:N",
        scale=alt.Scale(domain=list(arms), range=list(shades.values())),
        legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
    )
    kind: Any = "log" if log_x else "symlog" if symlog_x else None
    base = alt.Chart(data).encode(
        x=alt.X(
            "at:Q",
            title=x,
            scale=alt.Scale(type=kind) if kind else alt.Undefined,
            # On that scale only what was measured has a place worth naming.
            axis=alt.Axis(values=sorted(set(data["at"]))) if symlog_x else alt.Undefined,
        ),
        color=color,
    )
    scale = alt.Scale(type="log") if log_y else alt.Scale(zero=False)
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q")
    line = base.mark_line(point=alt.OverlayMarkDef(size=20)).encode(
        y=alt.Y("mean:Q", title=y, scale=scale), tooltip=[by, "at", "mean", "low", "high", "n"]
    )
    layers: list[alt.Chart] = [band, line]
    if expected is not None:
        rule = alt.Chart(pd.DataFrame([{"expected": expected}])).mark_rule(
            color=shades[arms[0]], strokeDash=[4, 4]
        )
        layers.append(rule.encode(y=alt.Y("expected:Q", scale=scale)))
    seeds, kind = frame["seed"].nunique(), "geometric mean" if log_y else "mean"
    least = data["n"].min() if len(data) else 0
    of = f"{seeds}" if least == seeds else f"{least} to {seeds}"
    return alt.layer(*layers).properties(
        width=480,
        height=260,
        title=alt.TitleParams(
            title,
            subtitle=f"{kind} of {of} seeds; band: pointwise 95% interval",
            anchor="start",
        ),
    )


def dots(
    frame: pd.DataFrame, *, title: str, x: str, arms: Sequence[str], log_x: bool = False
) -> alt.LayerChart:
    """Draw each seed's value as a dot, a row for each arm, with the means.

    Args:
        frame: As for `lines`; the subtitle says how many values are not finite, and not shown.
        title: What is shown.
        x: What the value is.
        arms: The rows, from above.
        log_x: Whether the value is shown on a logarithmic scale.
    """
    import altair as alt
    import numpy as np

    finite = frame[np.isfinite(frame["value"])]
    scale = alt.Scale(type="log") if log_x else alt.Scale(zero=False)
    shades = palette(tuple(arms))
    base = alt.Chart(finite).encode(
        y=alt.Y("arm:N", title=None, sort=list(arms)),
        color=alt.Color(
            "arm:N",
            scale=alt.Scale(domain=list(arms), range=list(shades.values())),
            legend=None,
        ),
    )
    seeds = base.mark_point(filled=True, size=45, opacity=0.55).encode(
        x=alt.X("value:Q", title=x, scale=scale), tooltip=["arm", "seed", "value"]
    )
    mean = base.mark_tick(thickness=3, size=28).encode(x=alt.X("mean(value):Q", scale=scale))
    return alt.layer(seeds, mean).properties(
        width=480,
        height=alt.Step(40),
        title=alt.TitleParams(
            title,
            subtitle="dots: seeds; stroke: their mean" + _failed(len(frame) - len(finite)),
            anchor="start",
        ),
    )


def scatter(
    frame: pd.DataFrame, *, title: str, x: str, y: str, arms: Sequence[str], log_x: bool = False
) -> alt.LayerChart:
    """Draw each seed's value over `at` as a dot, for values that each seed has at its own place.

    Args:
        frame: As for `dots`.
        title: What is shown.
        x: What `at` is.
        y: What the value is.
        arms: In the order of their colours; the first is grey.
        log_x: Whether `at` is shown on a logarithmic scale.
    """
    import altair as alt
    import numpy as np

    finite = frame[np.isfinite(frame["value"]) & np.isfinite(frame["at"])]
    base = alt.Chart(finite).encode(
        x=alt.X(
            "at:Q",
            title=x,
            scale=alt.Scale(type="log" if log_x else "linear", padding=20, nice=False),
        ),
        y=alt.Y("value:Q", title=y),
        color=alt.Color(
            "arm:N",
            scale=alt.Scale(domain=list(arms), range=list(PALETTE[: len(arms)])),
            legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
        ),
    )
    seeds = base.mark_point(filled=True, size=45, opacity=0.55).encode(
        tooltip=["arm", "seed", "at", "value"]
    )
    mean = base.mark_tick(thickness=3, size=28, orient="horizontal").encode(y="mean(value):Q")
    return alt.layer(seeds, mean).properties(
        width=480,
        height=260,
        title=alt.TitleParams(
            title,
            subtitle="dots: seeds; stroke: the mean of those at one place"
            + _failed(len(frame) - len(finite)),
            anchor="start",
        ),
    )


def _failed(count: int) -> str:
    return f"; not shown: {count} that failed" if count else ""
