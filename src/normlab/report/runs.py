"""Several runs in one page, side by side; each is judged by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab.errors import InputError, NormlabError
from normlab.files import replace
from normlab.report.charts import CHARTS, SPLITS, curve_rows, draw_curves, palette
from normlab.report.drawing import draw, figures, packed
from normlab.report.html import page, room, section, wide
from normlab.report.intervals import Scale
from normlab.report.page import CURVES, controls, downloads, session_rows
from normlab.report.raw import raw
from normlab.report.wording import difference, headline, interval, mean_and_sd, word
from normlab.study import Comparison
from normlab.training import Recipe

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["runs_html", "write_runs"]

_NOT_JUDGED = (
    "Each run is judged by itself, against its own baseline and as its own study declared. No run "
    "is judged against another: nothing was declared about a difference between runs before they "
    "ran. To compare two things, make them arms of one study."
)


def write_runs(comparisons: Sequence[Comparison], folder: Path) -> Path:
    """Write one page that sets runs side by side, in one step.

    Args:
        comparisons: Of two runs or more, in the order in which they are shown.
        folder: Gets `runs.html`; it is made if it is missing.

    Returns:
        The path of `runs.html`.

    Raises:
        InputError: Two are of the same folder.
        NormlabError: It cannot be written.
    """
    contents = runs_html(comparisons)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "runs.html", contents)
    except OSError as error:
        raise NormlabError(f"{folder}: the page cannot be written: {error.strerror}") from None
    return folder / "runs.html"


def runs_html(comparisons: Sequence[Comparison]) -> str:
    """Return a page that sets runs side by side: what each found, where they differ, the curves.

    There is no verdict across runs.

    Args:
        comparisons: Of two runs or more.

    Raises:
        InputError: Two are of the same folder.
    """
    runs = _named(comparisons)
    arms = tuple(dict.fromkeys(arm for one in comparisons for arm in one.study.arms))
    drawings = draw({metric: _curves(runs, metric, palette(arms)) for metric in CURVES})
    splits = {split for one in comparisons for split in one.frame()["split"]}
    main = [
        _answers(runs),
        section("Every run, every arm", wide(_table(runs), "Runs"), f"<p>{_NOT_JUDGED}</p>"),
        section("What the studies differ in", _differences(runs)),
        section(
            "Curves",
            controls(palette(arms), splits, several=True),
            figures(drawings),
        ),
        section("How they were measured", wide(_sessions(runs), "How they were measured")),
        section("Raw data", downloads()),
    ]
    text = "\n".join(main)
    specs = {name: packed(one.spec) for name, one in drawings.items()}
    share = room(text, specs) // len(runs)
    raws = [raw(one, name=name, room=share) for name, one in runs.items()]
    data = {"name": "runs", "curves": CURVES, "specs": specs, "runs": raws}
    return page(f"{len(runs)} runs side by side", "; ".join(runs), text, data)


def _named(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Return each under its study's name, or its folder's where that is not enough."""
    folders = Counter(one.folder.resolve() for one in comparisons)
    for folder, times in folders.items():
        if times > 1:
            raise InputError(f"{folder}: given {times} times: expected every run once")
    ways = (
        [one.study.name for one in comparisons],
        [f"{one.study.name} ({one.folder.resolve().name})" for one in comparisons],
        [f"{one.study.name} ({one.folder})" for one in comparisons],
    )
    names = next((way for way in ways if len(set(way)) == len(way)), ways[-1])
    return dict(zip(names, comparisons, strict=True))


def _answers(runs: Mapping[str, Comparison]) -> str:
    sentences = "".join(
        f"<p><strong>{escape(name)}</strong>: {escape(' '.join(headline(one)))}</p>"
        for name, one in runs.items()
    )
    return f'<section class="answer" aria-label="The answers">{sentences}</section>'


def _table(runs: Mapping[str, Comparison]) -> str:
    """Return a row for each run and arm, with all intervals on one scale."""
    metric = next(iter(runs.values())).metrics[0]
    verdicts = {
        (name, verdict.arm): verdict
        for name, one in runs.items()
        for verdict in one.verdicts
        if verdict.metric.name == metric.name
    }
    scale = Scale.of(verdicts.values())
    headings = (
        *("arm", f"{metric.label}, mean ± sd", "seeds", f"difference, {metric.unit}"),
        *("interval", "drawn", "verdict"),
    )
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = [
        "<table><caption>Each arm against the baseline of its own run</caption>",
        f"<thead><tr>{head}</tr></thead>",
    ]
    for name, one in runs.items():
        study = one.study
        about = f"{name}: against {study.baseline}, {study.confidence * 100:g}% intervals"
        axis = scale.axis() if scale else ""
        lines.append(
            f'<tbody><tr><th colspan="5" scope="rowgroup">{escape(about)}</th>'
            f'<td class="axis">{axis}</td><td></td></tr>'
        )
        for arm, summary in one.summary()["arms"].items():
            verdict = verdicts.get((name, arm))
            ours = summary[metric.name]
            cells = [mean_and_sd(metric, ours), str(ours["n"])]
            cells += [difference(verdict, unit=False), interval(verdict)] if verdict else ["", ""]
            texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            drawn = scale.row(verdict) if scale and verdict else ""
            said = word(verdict) if verdict else "baseline"
            lines.append(
                f'<tr><th scope="row">{escape(arm)}</th>{texts}<td>{drawn}</td>'
                f'<td class="{said.split()[0]}">{said}</td></tr>'
            )
        lines.append("</tbody>")
    return "\n".join([*lines, "</table>"])


def _differences(runs: Mapping[str, Comparison]) -> str:
    """Return the fields of the studies that are not the same in all, as HTML."""
    declared = [one.study.model_dump(mode="json") for one in runs.values()]
    rows = [
        (field, [_value(each[field]) for each in declared])
        # As in a declaration: what is compared first, then how it is trained.
        for field in sorted(declared[0], key=lambda field: field in Recipe.model_fields)
        if field != "description" and any(each[field] != declared[0][field] for each in declared)
    ]
    if not rows:
        return "<p>The studies declare the same.</p>"
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in ("field", *runs))
    body = "".join(
        f'<tr><th scope="row">{escape(field)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for field, values in rows
    )
    table = (
        "<table><caption>Fields of the studies that are not the same in all</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return wide(table, "Differences between the studies")


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} declared"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "none"
    return "none" if value in (None, "") else str(value)


def _curves(
    runs: Mapping[str, Comparison], metric: str, colors: Mapping[str, str]
) -> alt.TopLevelMixin:
    import altair as alt
    import pandas as pd

    frames = [curve_rows(one, metric).assign(run=name) for name, one in runs.items()]
    data: pd.DataFrame = pd.concat([one for one in frames if len(one)] or frames[:1])
    bands = ", ".join(dict.fromkeys(frame.attrs["band"] for frame in frames))
    subtitle = f"means over seeds, each arm at the setting that it is reported at; band: {bands}"
    epochs = max(one.study.epochs for one in runs.values())
    shown = [name for name in SPLITS.values() if name in set(data["split"])]
    return (
        draw_curves(data, metric, colors, epochs)
        .properties(width=250, height=200)
        .facet(
            row=alt.Row("split:N", title=None, sort=shown),
            column=alt.Column("run:N", title=None, sort=list(runs)),
        )
        .properties(
            title=alt.TitleParams(CHARTS[metric], subtitle=subtitle, anchor="start"),
            description=f"{CHARTS[metric]} over epochs of {', '.join(runs)}, side by side.",
        )
    )


def _sessions(runs: Mapping[str, Comparison]) -> str:
    body = ""
    for name, one in runs.items():
        body += f'<tr><th colspan="2" scope="rowgroup">{escape(name)}</th></tr>'
        rows = [("Folder", str(one.folder)), *session_rows(one)]
        body += "".join(
            f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>'
            for label, value in rows
        )
    return f'<table class="details"><tbody>{body}</tbody></table>'
