"""The table at the end: every arm on every metric, with its difference and verdict."""

from __future__ import annotations

import io
from html import escape
from itertools import groupby
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from normlab.report.wording import difference, interval, mean_and_sd, word
from normlab.study import Comparison

__all__ = ["html_table", "terminal_table", "text_table"]


class Row(NamedTuple):
    """One arm on one metric, in words."""

    metric: str
    arm: str
    value: str
    difference: str
    interval: str
    p: str
    verdict: str


def _rows(comparison: Comparison) -> list[Row]:
    arms = comparison.summary()["arms"]
    verdicts = {(one.metric.name, one.arm): one for one in comparison.verdicts}
    rows = []
    for metric in comparison.metrics:
        label = f"{metric.label}, differences in {metric.unit}"
        for arm in comparison.study.arms:
            value = mean_and_sd(metric, arms[arm][metric.name])
            one = verdicts.get((metric.name, arm))
            if one is None:
                rows.append(Row(label, arm, value, "", "", "", "baseline"))
                continue
            p = "" if one.p_holm is None else _p(one.p_holm)
            rows.append(
                Row(label, arm, value, difference(one, unit=False), interval(one), p, word(one))
            )
    return rows


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _headings(comparison: Comparison) -> tuple[str, ...]:
    confidence = f"{comparison.study.confidence:.0%} interval"
    return "arm", "mean ± sd", "difference", confidence, "p (Holm)", "verdict"


def terminal_table(comparison: Comparison) -> Group:
    """Return the table for a terminal: a block for each metric, with the columns of all aligned."""
    rows, headings = _rows(comparison), _headings(comparison)
    widths = [max(len(row[i + 1]) for row in rows) for i in range(len(headings))]
    widths = [min(max(pair), 24) for pair in zip(widths, map(len, headings), strict=True)]
    blocks: list[RenderableType] = [_block([headings], widths, "dim")]
    for metric, group in groupby(rows, key=lambda row: row.metric):
        blocks += [Text(metric, style="bold"), _block([row[1:] for row in group], widths)]
    return Group(*blocks)


def _block(rows: list[tuple[str, ...]], widths: list[int], style: str = "") -> Table:
    block = Table.grid(padding=(0, 2))
    for width in widths:
        block.add_column(width=width)
    for *cells, verdict in rows:
        color = {"better": "green", "worse": "red"}.get(verdict, style)
        block.add_row(*(Text(cell, style=style) for cell in cells), Text(verdict, style=color))
    return block


def text_table(comparison: Comparison, width: int = 110) -> str:
    """Return the table as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(terminal_table(comparison))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def html_table(comparison: Comparison) -> str:
    """Return the table as HTML, with a row header for each metric."""
    lines = [
        "<table>",
        "<caption>Each arm against the baseline, over seeds</caption>",
        "<thead><tr>",
    ]
    lines += [f'<th scope="col">{escape(heading)}</th>' for heading in _headings(comparison)]
    lines.append("</tr></thead>")
    for metric, group in groupby(_rows(comparison), key=lambda row: row.metric):
        lines.append(f'<tbody><tr><th colspan="6" scope="rowgroup">{escape(metric)}</th></tr>')
        for row in group:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[2:6])
            lines.append(
                f'<tr><th scope="row">{escape(row.arm)}</th>{cells}'
                f'<td class="{row.verdict.split()[0]}">{escape(row.verdict)}</td></tr>'
            )
        lines.append("</tbody>")
    lines.append("</table>")
    return "\n".join(lines)
