"""What a text printed, beside what was measured."""

from __future__ import annotations

from html import escape
from typing import Any

from normlab.study import Comparison, PublishedFigure

__all__ = ["published_sentence", "published_table"]


def published_sentence(comparison: Comparison) -> str:
    """Return how many of the published figures one more seed could have given."""
    figures = comparison.published
    measured = [one for one in figures if one["n"]]
    told = [one["within"] for one in measured if one["within"] is not None]
    if not measured:
        return "Nothing that the text printed was measured here."
    if not told:
        return "Whether a seed could give what the text printed, two seeds would tell."
    confidence = f"{comparison.study.confidence * 100:g}%"
    lie = f"{sum(told)} of {len(told)} published figures lie inside"
    if len(told) == 1:
        lie = f"The published figure lies {'inside' if told[0] else 'outside'}"
    return f"{lie} the {confidence} interval for one more seed trained as here."


def published_table(comparison: Comparison) -> str:
    """Return the figures as HTML."""
    confidence = f"{comparison.study.confidence * 100:g}%"
    headings = (
        "printed",
        "here, mean ± sd",
        "difference",
        f"one more seed, {confidence}",
        "within",
    )
    lines = ["<table>", "<caption>What the text printed, and what was measured here</caption>"]
    lines += ["<thead><tr>", '<th scope="col">figure</th>']
    lines += [f'<th scope="col">{escape(heading)}</th>' for heading in headings]
    lines.append("</tr></thead><tbody>")
    for figure, row in zip(comparison.study.published, comparison.published, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(figure, row))
        lines.append(f'<tr><th scope="row">{escape(row["place"])}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _cells(figure: PublishedFigure, row: dict[str, Any]) -> list[str]:
    if row["mean"] is None:
        return [figure.printed, "not measured", "", "", "", ""]
    spread = "" if row["sd"] is None else f" ± {figure.show(row['sd']).lstrip('+')}"
    difference = f"{row['difference']:+.3f}"
    if figure.metric == "accuracy":
        difference = f"{row['difference'] * 100:+.2f} points"
    interval, within = "", ""
    if row["within"] is not None:
        interval = f"{figure.show(row['low'])} to {figure.show(row['high'])}"
        within = "yes" if row["within"] else "no"
    mean, seeds = figure.show(row["mean"]) + spread, str(row["n"])
    cells = [figure.printed, mean, seeds, difference, interval, within]
    return [cell.replace("-", "−") for cell in cells]
