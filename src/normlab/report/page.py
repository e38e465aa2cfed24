"""The report: one HTML file that works offline, the charts as files, and the summary."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from normlab.errors import NormlabError
from normlab.files import replace
from normlab.report.charts import CHARTS, chart
from normlab.report.layers import layers_html
from normlab.report.published import published_sentence, published_table
from normlab.report.table import evidence_table, html_table
from normlab.report.wording import duration, headline, sentence
from normlab.study import Comparison

__all__ = ["page_html", "write"]


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
    import vl_convert

    specs = _specs(comparison)
    pictures = {name: vl_convert.vegalite_to_svg(spec) for name, spec in specs.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, spec in specs.items():
            replace(folder / f"{name}.svg", pictures[name])
            replace(folder / f"{name}.png", vl_convert.vegalite_to_png(spec, scale=2))
        replace(folder / "summary.json", json.dumps(comparison.summary(), indent=2) + "\n")
        replace(folder / "report.html", _html(comparison, specs, pictures))
    except OSError as error:
        raise NormlabError(
            f"{folder}: the report cannot be written: {error.strerror}; the measurements are kept: "
            f"mend that, and run normlab report {comparison.folder}"
        ) from None
    return folder / "report.html"


def page_html(comparison: Comparison) -> str:
    """Return the report as one self-contained page, also while the study runs.

    What changes with the measurements is in its elements `report` and `data`; once both have new
    contents, `normlab.draw()` draws the charts again.
    """
    import vl_convert

    specs = _specs(comparison)
    pictures = {name: vl_convert.vegalite_to_svg(spec) for name, spec in specs.items()}
    return _html(comparison, specs, pictures)


def _html(comparison: Comparison, specs: dict[str, Any], pictures: dict[str, str]) -> str:
    """Return the report as one self-contained page.

    The charts stand in it as SVG, so that it can be read without JavaScript; where that runs, they
    are replaced by interactive ones. Nothing is fetched from anywhere.
    """
    import vl_convert

    # The library's stub does not know that the snippet may be left out.
    library = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    figures = "\n".join(
        f'<figure><div id="chart-{name}">{picture}</div></figure>'
        for name, picture in pictures.items()
    )
    template = Template((resources.files(__package__) / "page.html").read_text("utf-8"))
    return template.substitute(
        title=escape(comparison.study.name),
        description=escape(comparison.study.description),
        answer="".join(f"<p>{escape(sentence)}</p>" for sentence in headline(comparison)),
        table=html_table(comparison),
        evidence=_evidence(comparison) + _published(comparison),
        figures=figures,
        layers=_layers(comparison),
        details=_details(comparison),
        declaration=escape(comparison.study.to_toml()),
        library=library,
        # "</" would end the script element.
        specs=json.dumps(specs).replace("</", "<\\/"),
    )


def _specs(comparison: Comparison) -> dict[str, Any]:
    """Return the Vega-Lite specifications of the charts that have something to show."""
    names = list(CHARTS)
    if len(comparison.study.arms) == 1:
        names.remove("difference")
    return {name: chart(comparison, name).to_dict() for name in names}


def _evidence(comparison: Comparison) -> str:
    """Return the tests and the sentences that go with them; nothing if there is one arm."""
    if not comparison.verdicts:
        return ""
    sentences = "".join(
        f"<li>{escape(sentence(one))}</li>" for one in comparison.verdicts if one.reason
    )
    return (
        f'<h2>The evidence</h2><div class="wide">{evidence_table(comparison)}</div>'
        "<p>d_z is the mean difference in standard deviations of the differences. Pairing is worth "
        "what the correlation between the arms over seeds is. The sign-flip p is a second opinion "
        "that assumes nothing of the differences' distribution. The equivalence p is that of two "
        "one-sided t tests.</p>"
    ) + (f"<ul>{sentences}</ul>" if sentences else "")


def _published(comparison: Comparison) -> str:
    """Return the table of what the text printed; nothing if it printed nothing."""
    if not comparison.study.published:
        return ""
    return (
        f'<h2>What was published</h2><div class="wide">{published_table(comparison)}</div>'
        f"<p>{escape(published_sentence(comparison))}</p>"
    )


def _layers(comparison: Comparison) -> str:
    frame = comparison.layers()
    if frame.empty:  # Nothing has been trained.
        return ""
    return (
        f'<h2>The networks, layer by layer</h2><div class="wide">{layers_html(frame)}</div>'
        "<p>Output is what a layer makes of one sample. γ and β are what the norms learned: the "
        "mean over channels and seeds (the least to the largest), without replicas that diverged."
        "</p>"
    )


def _evaluated(comparison: Comparison) -> str:
    steps, epoch = comparison.study.evaluate_every, comparison.steps_per_epoch
    size = f" of {epoch:,} steps" if epoch else ""
    often = f" and every {steps:,} steps within it" if steps else ""
    return (
        f"after every epoch{size}{often}, in eval mode; "
        "steps to a target are counted at evaluations"
    )


def _details(comparison: Comparison) -> str:
    """Return the rows that say how the numbers came about."""
    rows = [
        ("Seeds", ", ".join(map(str, comparison.study.seeds))),
        ("Replicas", str(len(comparison.study.replicas))),
        ("Time spent measuring", duration(comparison.seconds)),
        ("Evaluated", _evaluated(comparison)),
    ]
    if len(comparison.study.settings) > 1:
        chosen = "; ".join(f"{arm} {setting}" for arm, setting in comparison.reported.items())
        rows.append(("Chosen, each by the other seeds", chosen))
    for session in comparison.sessions:
        versions = json.loads(session["versions"])
        machine = json.loads(session["machine"])
        parts = [
            *(f"{name} {version}" for name, version in versions.items()),
            f"{machine['system']}, {machine['processor']}, {machine['threads']} threads",
            f"{session['workers']} worker process{'es' * (session['workers'] != 1)}",
        ]
        rows.append((f"Measured from {session['started']}", "; ".join(parts)))
    return "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
