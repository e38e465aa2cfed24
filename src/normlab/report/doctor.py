"""A diagnosis as charts, and as one HTML page that works offline."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab.doctor import Diagnosis, Finding
from normlab.errors import NormlabError
from normlab.files import replace
from normlab.report.drawing import draw, figures, packed
from normlab.report.html import page, section, wide

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["diagnosis_chart", "findings_html", "write_diagnosis"]

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, as in other charts.


def diagnosis_chart(diagnosis: Diagnosis) -> alt.TopLevelMixin:
    """Draw, layer by layer, running against true statistics, γ, and units that do nothing."""
    import altair as alt

    layers = diagnosis.layers()
    names = list(layers["layer"])
    layers = layers.assign(layer=[name or "the model" for name in names])
    panels: list[Any] = [
        panel for panel in (_drift(layers), _gamma(layers), _units(diagnosis)) if panel
    ]
    return (
        alt.vconcat(*panels)
        .resolve_scale(color="independent")
        .properties(title=alt.TitleParams(diagnosis.summary, anchor="start"))
    )


def _drift(layers: pd.DataFrame) -> alt.Chart | None:
    import altair as alt

    order = list(layers["layer"])
    told = {
        "mean_off": "|running mean − mean|, in deviations",
        "variance_off": "|ln(running variance / variance)|",
    }
    long = layers.melt("layer", list(told), "quantity", "value").dropna()
    if long.empty:
        return None
    long = long.assign(quantity=long["quantity"].map(told), value=long["value"].astype(float))
    return (
        alt.Chart(long, title="Running against true statistics, 95th percentile over channels")
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(
            x=alt.X("value:Q", title=None),
            y=alt.Y("layer:N", sort=order, title=None),
            color=alt.Color(
                "quantity:N",
                scale=alt.Scale(domain=list(told.values()), range=[_BLUE, _ORANGE]),
                legend=alt.Legend(title=None, orient="top", labelLimit=400),
            ),
            tooltip=["layer:N", "quantity:N", alt.Tooltip("value:Q", format=".3g")],
        )
        .properties(width=560, height=alt.Step(16))
    )


def _gamma(layers: pd.DataFrame) -> alt.TopLevelMixin | None:
    import altair as alt
    import pandas as pd

    known = layers.loc[layers["gamma"].notna()]
    if known.empty:
        return None
    columns = ["low", "lower", "median", "upper", "high"]
    values = pd.DataFrame(known["gamma"].tolist(), columns=columns)
    values["layer"] = list(known["layer"])
    base = alt.Chart(values).encode(
        y=alt.Y("layer:N", sort=list(values["layer"]), title=None),
        tooltip=["layer:N", *(alt.Tooltip(f"{each}:Q", format=".3g") for each in columns)],
    )
    return (
        alt.layer(
            base.mark_rule(color=_GREEN).encode(x=alt.X("low:Q", title=None), x2="high:Q"),
            base.mark_bar(color=_GREEN, size=7, opacity=0.6).encode(x="lower:Q", x2="upper:Q"),
            base.mark_tick(color="#1f2937", thickness=2, size=9).encode(x="median:Q"),
        )
        .properties(width=560, height=alt.Step(16))
        .properties(title="γ: smallest, quartiles and largest")
    )


def _units(diagnosis: Diagnosis) -> alt.Chart | None:
    import altair as alt
    import pandas as pd

    rows = [
        {
            "place": each.place or "the model",
            "share": each.dead if each.dead is not None else each.saturated,
            "units": "dead" if each.dead is not None else "saturated",
        }
        for each in diagnosis.units
        if each.dead is not None or each.saturated is not None
    ]
    if not rows:
        return None
    return (
        alt.Chart(pd.DataFrame(rows), title="Units that are dead, or saturated")
        .mark_bar(size=9)
        .encode(
            x=alt.X(
                "share:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
            ),
            y=alt.Y("place:N", sort=[str(row["place"]) for row in rows], title=None),
            color=alt.Color(
                "units:N",
                scale=alt.Scale(domain=["dead", "saturated"], range=[_BLUE, _ORANGE]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["place:N", "units:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=560, height=alt.Step(16))
    )


def write_diagnosis(diagnosis: Diagnosis, path: Path) -> Path:
    """Write a diagnosis as one page, in one step.

    Args:
        diagnosis: What to report.
        path: Of the page; its folder is made if it is missing.

    Raises:
        NormlabError: It cannot be written.
    """
    drawings = draw({"diagnosis": diagnosis_chart(diagnosis)})
    main = [
        section("Findings", findings_html(diagnosis) or "<p>Nothing was found.</p>"),
        section(
            "Layer by layer", figures(drawings), wide(_layers_html(diagnosis), "Layers"), _GLOSS
        ),
        section("Not measured, and what it would need", _missing_html(diagnosis)),
    ]
    specs = {name: packed(one.spec) for name, one in drawings.items()}
    contents = page(
        "Diagnosis", diagnosis.summary, "\n".join(main), {"name": "normlab", "specs": specs}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, contents)
    except OSError as error:
        raise NormlabError(f"{path}: the report cannot be written: {error.strerror}") from None
    return path


_GLOSS = """\
<p class="gloss">m_eff is how many independent values a batch is worth. Mean off and variance off
are 95th percentiles over channels: of |running mean − mean| in deviations, and of
|ln(running variance / variance)|.</p>"""


def findings_html(diagnosis: Diagnosis) -> str:
    """Return the findings, those of one signal together."""
    return "\n".join(_section(first, group) for first, group in diagnosis.groups())


def _section(first: Finding, group: list[Finding]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(each.layer or "the model")}</th>'
        f"<td>{escape(each.quantity)}</td><td>{each.measured:.4g}</td><td>{each.threshold:.4g}</td>"
        "</tr>"
        for each in group
    )
    headings = ("layer", "measured", "value", "threshold")
    columns = "".join(f'<th scope="col">{each}</th>' for each in headings)
    head = f"<thead><tr>{columns}</tr></thead>"
    return (
        f'<section class="{escape(first.weight)}"><h3>{escape(first.weight)}: '
        f"{escape(first.signal)}</h3><p>{escape(first.why)}.</p>"
        + wide(f"<table>{head}<tbody>{rows}</tbody></table>", first.signal)
        + f'<pre tabindex="0" role="group" aria-label="What to do">'
        f"{escape(_fixes(group))}</pre>"
        f'<p class="description">{escape(first.source)}</p></section>'
    )


def _fixes(group: list[Finding]) -> str:
    return "\n".join(dict.fromkeys(each.fix for each in group))


def _missing_html(diagnosis: Diagnosis) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(signal)}</th><td>{escape(needed)}</td></tr>'
        for signal, needed in diagnosis.not_measured.items()
    )
    if not rows:
        return "<p>Everything was measured.</p>"
    return wide(f'<table class="details"><tbody>{rows}</tbody></table>', "Not measured")


def _layers_html(diagnosis: Diagnosis) -> str:
    headings = (
        *("layer", "kind", "channels", "momentum", "updates", "values in a batch", "m_eff"),
        *("mean off", "variance off", "γ (median)"),
    )
    head = "".join(f'<th scope="col">{each}</th>' for each in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for cells in _rows(diagnosis)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rows(diagnosis: Diagnosis) -> Iterator[list[str]]:
    for each in diagnosis.numbers:
        numbers = (
            *(each.momentum, each.updates, each.values, each.worth),
            *(each.mean_off, each.variance_off, each.gamma and each.gamma[2]),
        )
        yield [
            each.layer or "the model",
            each.kind + " (frozen)" * each.frozen,
            str(each.channels),
            *("" if number is None else f"{number:.4g}" for number in numbers),
        ]
