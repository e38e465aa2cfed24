"""The report: one HTML file that works offline, the charts as files, and the summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.errors import NormlabError
from normlab.files import replace
from normlab.report.charts import SPLITS, chart, colors, with_something_to_show
from normlab.report.drawing import Drawing, draw, figures, packed
from normlab.report.html import page, room, section, wide
from normlab.report.inside import inside_charts
from normlab.report.layers import layers_html
from normlab.report.published import published_sentence, published_table
from normlab.report.raw import raw
from normlab.report.sensitivity import chosen_sentence
from normlab.report.table import evidence_table, html_table
from normlab.report.wording import duration, headline, sentence
from normlab.study import Comparison

if TYPE_CHECKING:
    import altair as alt

__all__ = ["CURVES", "controls", "downloads", "page_html", "session_rows", "write"]

CURVES = ("accuracy", "loss")
"""The charts that the page's controls change."""


def write(comparison: Comparison, folder: Path) -> Path:
    """Write the report, its charts and the summary, each file in one step.

    Args:
        comparison: What to report.
        folder: Gets `report.html`, `summary.json`, and an SVG and a PNG of each chart.

    Returns:
        The path of `report.html`.

    Raises:
        NormlabError: The folder cannot be written, or the disk is full.
    """
    sections = _drawn(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, one in _all(sections).items():
            replace(folder / f"{name}.svg", one.svg)
            replace(folder / f"{name}.png", one.png)
        replace(folder / "summary.json", json.dumps(comparison.summary(), indent=2) + "\n")
        replace(folder / "report.html", _page(comparison, sections))
    except OSError as error:
        raise NormlabError(
            f"{folder}: the report cannot be written: {error.strerror}; the measurements are kept: "
            f"mend that, and run normlab report {comparison.folder}"
        ) from None
    return folder / "report.html"


def page_html(comparison: Comparison) -> str:
    """Return the report as one page that fetches nothing, of a run that is not complete too.

    The charts stand in it as SVG, so that it can be read without JavaScript; where that runs, they
    are replaced by interactive ones. All that depends on the run is inside `<main id="report">` and
    the JSON of `<script id="data">`: a page whose contents of both are replaced shows the new state
    after `window.normlab.draw()`, with its controls as they were.
    """
    return _page(comparison, _drawn(comparison))


def _charts(comparison: Comparison) -> dict[str, dict[str, alt.TopLevelMixin]]:
    """Return the charts that have something to show, by the section that they stand in."""
    drawn = {name: chart(comparison, name) for name in with_something_to_show(comparison)}
    sections = {
        "Curves": {name: drawn.pop(name) for name in CURVES},
        "Outcomes": drawn,
        "What happened inside": inside_charts(comparison),
    }
    return {heading: charts for heading, charts in sections.items() if charts}


def _drawn(comparison: Comparison) -> dict[str, dict[str, Drawing]]:
    return {heading: draw(charts) for heading, charts in _charts(comparison).items()}


def _all(sections: Mapping[str, Mapping[str, Drawing]]) -> dict[str, Drawing]:
    return {name: one for drawings in sections.values() for name, one in drawings.items()}


def _page(comparison: Comparison, sections: Mapping[str, Mapping[str, Drawing]]) -> str:
    study = comparison.study
    bodies = {heading: figures(drawings) for heading, drawings in sections.items()}
    main = [
        _answer(comparison),
        section("Every arm, every metric", wide(html_table(comparison), "Verdicts"), _HOW_TO_READ),
        section(
            "Curves",
            controls(
                colors(comparison), comparison.frame()["split"], seeds=not comparison.complete
            ),
            bodies.pop("Curves"),
        ),
        section("Outcomes", bodies.pop("Outcomes", ""), _rates(comparison)),
        *(section(heading, body) for heading, body in bodies.items()),
        _evidence(comparison),
        _published(comparison),
        _layers(comparison),
        section("How this was measured", *_measured(comparison)),
        section(
            "The study",
            '<pre tabindex="0" role="group" aria-label="The study as TOML">'
            f"{escape(study.to_toml())}</pre>",
        ),
        section("Raw data", downloads()),
    ]
    text = "\n".join(filter(None, main))
    specs = {name: packed(one.spec) for name, one in _all(sections).items()}
    runs = [raw(comparison, name=study.name, room=room(text, specs))]
    data = {"name": study.name, "curves": CURVES, "specs": specs, "runs": runs}
    return page(study.name, study.description, text, data)


_HOW_TO_READ = """\
<p class="gloss">Each seed is one pair of replicas with the same first weights and the same order
of the data. Means and standard deviations are over seeds; differences are paired, seed by seed,
with their t interval, drawn as a bar with the mean as a dot; the upright line is no difference, and
the shade differences that the study declared not to matter. <em>Failed</em> are replicas that
diverged, or never got to the target; they are not in the mean. p is the t test's (the sign test's
where a replica failed), adjusted for all arms by Holm's method. <em>Equivalent</em> means inside
the margin that the study declared; <em>inconclusive</em> means that these runs cannot tell. Each
metric is judged by itself; the first is the answer.</p>"""


def _answer(comparison: Comparison) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in headline(comparison))
    return f'<section class="answer" aria-label="The answer">{sentences}</section>'


def controls(
    arms: Mapping[str, str], splits: Iterable[str], *, seeds: bool = False, several: bool = False
) -> str:
    """Return the form that changes curves; hidden until the script runs that it needs.

    Args:
        arms: Each with its colour.
        splits: Those that were measured; others than `SPLITS` have no curves.
        seeds: Whether every seed's line is drawn at first.
        several: Whether there are several runs, which can be set in one panel.
    """
    known = set(splits)
    boxes = [
        _group(
            "Arms",
            *(
                _box("arm", arm, _swatch(color) + escape(arm), checked=True)
                for arm, color in arms.items()
            ),
        ),
        _group(
            "Data",
            *(
                _box("split", label, label, checked=not several or label == "test")
                for split, label in SPLITS.items()
                if split in known
            ),
        ),
        _group("Metric", *(_box("metric", each, each, checked=True) for each in CURVES)),
        _group(
            "Horizontal axis",
            *(
                _box("x", each, each, checked=each == "epochs", kind="radio")
                for each in ("epochs", "steps", "seconds")
            ),
        ),
        _group(
            "Scales", _box("log-x", "1", "log horizontally"), _box("log-y", "1", "log of the loss")
        ),
        _group(
            "Lines",
            _box("seeds", "1", "every seed", checked=seeds),
            *([_box("together", "1", "runs in one panel, by dashes")] if several else []),
        ),
    ]
    return (
        '<form id="controls" class="controls" aria-label="What the curves show" hidden>'
        f'{"".join(boxes)}<button type="reset">As at first</button></form>'
    )


def _group(legend: str, *boxes: str) -> str:
    return f"<fieldset><legend>{legend}</legend>{''.join(boxes)}</fieldset>" if boxes else ""


def _box(
    name: str, value: str, label: str, *, checked: bool = False, kind: str = "checkbox"
) -> str:
    mark = " checked" * checked
    return (
        f'<label><input type="{kind}" name="{name}" value="{escape(value)}"{mark}>{label}</label>'
    )


def _swatch(color: str) -> str:
    return f'<span class="swatch" data-color="{color}" style="background:{color}"></span>'


def downloads() -> str:
    """Return buttons that save what the page carries, and the command that does without them."""
    buttons = " ".join(
        f'<button type="button" data-csv="{what}">Save {what} as CSV</button>'
        for what in ("measurements", "replicas")
    )
    return (
        f'<p class="downloads" hidden>{buttons} <span></span></p>'
        "<p>Every measurement, and what each replica ended with, as a command writes them from a "
        "run's folder: <code>normlab export FOLDER --to csv</code></p>"
    )


def _rates(comparison: Comparison) -> str:
    """Return which learning rates are reported; nothing if there is one."""
    told = chosen_sentence(comparison)
    return f"<p>{escape(told)}</p>" if told else ""


def _evidence(comparison: Comparison) -> str:
    """Return the tests and the sentences that go with them; nothing if there is one arm."""
    if not comparison.verdicts:
        return ""
    sentences = "".join(
        f"<li>{escape(sentence(one))}</li>" for one in comparison.verdicts if one.reason
    )
    return section(
        "The evidence",
        wide(evidence_table(comparison), "Tests"),
        "<p>d_z is the mean difference in standard deviations of the differences. Pairing is worth "
        "what the correlation between the arms over seeds is. The sign-flip p is a second opinion "
        "that assumes nothing of the differences' distribution. The equivalence p is that of two "
        "one-sided t tests.</p>",
        f"<ul>{sentences}</ul>" if sentences else "",
    )


def _published(comparison: Comparison) -> str:
    """Return the table of what the text printed; nothing if it printed nothing."""
    if not comparison.study.published:
        return ""
    return section(
        "What was published",
        wide(published_table(comparison), "Published figures"),
        f"<p>{escape(published_sentence(comparison))}</p>",
    )


def _layers(comparison: Comparison) -> str:
    frame = comparison.layers()
    if frame.empty:  # Nothing has been trained.
        return ""
    return section(
        "The networks, layer by layer",
        wide(layers_html(frame), "Layers"),
        "<p>Output is what a layer makes of one sample. γ and β are what the norms learned: the "
        "mean over channels and seeds (the least to the largest), without replicas that diverged."
        "</p>",
    )


def _measured(comparison: Comparison) -> list[str]:
    """Return the tables that say how the numbers came about."""
    rows = [
        ("Seeds", ", ".join(map(str, comparison.study.seeds))),
        ("Replicas", f"{len(comparison.study.replicas):,}"),
        ("Time spent measuring", duration(comparison.seconds)),
        ("Evaluated", _evaluated(comparison)),
    ]
    if len(comparison.study.settings) > 1:
        chosen = "; ".join(f"{arm} {setting}" for arm, setting in comparison.reported.items())
        rows.append(("Chosen, each by the other seeds", chosen))
    rows += session_rows(comparison)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
    return [
        '<div class="wide" tabindex="0" role="group" aria-label="How this was measured">'
        f'<table class="details"><tbody>{body}</tbody></table></div>',
        _speed(comparison),
    ]


def _evaluated(comparison: Comparison) -> str:
    steps, epoch = comparison.study.evaluate_every, comparison.steps_per_epoch
    size = f" of {epoch:,} steps" if epoch else ""
    often = f" and every {steps:,} steps within it" if steps else ""
    return (
        f"after every epoch{size}{often}, in eval mode; "
        "steps to a target are counted at evaluations"
    )


def session_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return, for each time that something was measured, when, with what and on what."""
    rows = []
    for session in comparison.sessions:
        versions = json.loads(session["versions"])
        machine = json.loads(session["machine"])
        device = machine.get("device", "cpu")
        parts = [
            *(f"{name} {version}" for name, version in versions.items()),
            f"{machine['system']}, {machine['processor']}, {machine['threads']} threads",
            *([] if device == "cpu" else [f"trained on {device}"]),
            f"{session['workers']} worker process{'es' * (session['workers'] != 1)}",
        ]
        rows.append((f"Measured from {session['started']}", "; ".join(parts)))
    return rows


def _speed(comparison: Comparison) -> str:
    """Return how fast each arm trained, and what trained it; nothing before a replica ended."""
    ends = comparison.replicas().query("seconds > 0 and step > 0")
    if ends.empty:
        return ""
    rows = ""
    for arm in comparison.study.arms:
        ours = ends[ends["arm"] == arm]
        if ours.empty:
            continue
        engine = ours["engine"].iloc[0]
        cells = (
            engine if isinstance(engine, str) else "not recorded",
            f"{len(ours)}",
            f"{ours['seconds'].mean():.3g} s",
            f"{ours['step'].sum() / ours['seconds'].sum():,.0f}",
        )
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{escape(arm)}</th>{row}</tr>'
    head = "".join(
        f'<th scope="col">{each}</th>'
        for each in ("arm", "engine", "replicas that ended", "a replica, mean", "steps a second")
    )
    table = (
        "<table><caption>Speed on that machine: a replica's share of the time of all that were "
        f"trained in lockstep with it, evaluation included</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    return wide(table, "Speed")
