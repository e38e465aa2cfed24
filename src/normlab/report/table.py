"""The table at the end: every arm on every metric, with its difference and verdict."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from itertools import groupby
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from normlab.report.intervals import Scale
from normlab.report.wording import difference, interval, mean_and_sd, word
from normlab.study import Comparison, Verdict

__all__ = ["TerminalTable", "evidence_table", "html_table", "text_table"]


# On a narrow terminal the means and the intervals take two lines; names and verdicts never do.
_MAY_WRAP = (1, 3)
_LEAST_WIDTH = 8
_GAP = 2


class Row(NamedTuple):
    """One arm on one metric, in words."""

    metric: str
    arm: str
    value: str
    difference: str
    interval: str
    p: str
    verdict: str


def evidence_table(comparison: Comparison) -> str:
    """Return what lies behind the verdicts as HTML: sizes, tests, and what goes with them."""
    columns: dict[str, Callable[[Verdict], str]] = {
        "pairs": lambda one: str(one.n),
        "effect size d_z": lambda one: _number(one.effect_size, "+.2f"),
        "seeds improved": lambda one: _number(one.share_improved, ".0%"),
        "correlation": lambda one: _number(one.correlation, "+.2f"),
        "p, t test": lambda one: (
            _p(one.p) + " (sign test)" * (one.p is not None and one.interval is None)
        ),
        "p, sign flips": _sign_flip,
        "p, equivalence (Holm)": lambda one: _p(one.p_equivalence),
        "margin": lambda one: (
            "" if one.equivalence_margin is None else f"±{one.metric.show(one.equivalence_margin)}"
        ),
        "more seeds": _more_seeds,
    }
    lines = [
        '<table class="tests">',
        "<caption>The tests behind the verdicts</caption>",
        "<thead><tr>",
    ]
    lines += [f'<th scope="col">{escape(name)}</th>' for name in ("arm", *columns)]
    lines.append("</tr></thead>")
    for metric, group in groupby(comparison.verdicts, key=lambda one: one.metric.label):
        span = len(columns) + 1
        lines.append(f'<tbody><tr><th colspan="{span}" scope="rowgroup">{escape(metric)}</th></tr>')
        for one in group:
            cells = "".join(f"<td>{escape(show(one))}</td>" for show in columns.values())
            lines.append(f'<tr><th scope="row">{escape(one.arm)}</th>{cells}</tr>')
        lines.append("</tbody>")
    lines.append("</table>")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}".replace("-", "−")


def _more_seeds(one: Verdict) -> str:
    if one.seeds_needed is None:
        return "none up to 1,000" if one.verdict == "inconclusive" else ""
    return f"about {one.seeds_needed}" if one.seeds_needed else ""


def _sign_flip(one: Verdict) -> str:
    """Return the p, and say so where the test has too few seeds to speak."""
    least = 2 / 2**one.n
    silent = one.p_sign_flip is not None and least >= 1 - one.confidence
    return _p(one.p_sign_flip) + (f" (never under {_p(least)})" if silent else "")


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
            size = difference(one, unit=False)
            rows.append(Row(label, arm, value, size, interval(one), _p(one.p_holm), word(one)))
    return rows


def _p(value: float | None) -> str:
    if value is None:
        return ""
    if value > 0.999:
        return "> .999"
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _headings(comparison: Comparison) -> tuple[str, ...]:
    confidence = f"{comparison.study.confidence * 100:g}% interval"
    return "arm", "mean ± sd", "difference", confidence, "p (Holm)", "verdict"


class TerminalTable:
    """The table for a terminal: a block for each metric, with the columns of all aligned.

    Args:
        comparison: What to show.
    """

    def __init__(self, comparison: Comparison) -> None:
        self._rows = _rows(comparison)
        self._headings = _headings(comparison)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(options.max_width)
        yield _block([self._headings], widths, "dim")
        for metric, group in groupby(self._rows, key=lambda row: row.metric):
            yield Text(metric, style="bold")
            yield _block([row[1:] for row in group], widths)

    def _widths(self, available: int) -> list[int]:
        """Return the widths of the columns; without room, the widest that may wrap gives way."""
        lines = [self._headings, *(row[1:] for row in self._rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        while sum(widths) + _GAP * (len(widths) - 1) > available:
            widest = max(_MAY_WRAP, key=lambda i: widths[i])
            if widths[widest] <= _LEAST_WIDTH:
                break
            widths[widest] -= 1
        return widths


def _block(rows: list[tuple[str, ...]], widths: list[int], style: str = "") -> Table:
    block = Table.grid(padding=(0, _GAP, 0, 0))
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
        console.print(TerminalTable(comparison))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def html_table(comparison: Comparison) -> str:
    """Return the table as HTML, with a row header for each metric and the intervals drawn."""
    headings = [*_headings(comparison)]
    headings.insert(4, "drawn")
    verdicts = {(one.metric.name, one.arm): one for one in comparison.verdicts}
    lines = [
        "<table>",
        "<caption>Each arm against the baseline, over seeds</caption>",
        "<thead><tr>",
    ]
    lines += [f'<th scope="col">{escape(heading)}</th>' for heading in headings]
    lines.append("</tr></thead>")
    groups = groupby(_rows(comparison), key=lambda row: row.metric)
    for metric, (label, group) in zip(comparison.metrics, groups, strict=True):
        scale = Scale.of(one for one in comparison.verdicts if one.metric.name == metric.name)
        axis = scale.axis() if scale else ""
        lines.append(
            f'<tbody><tr><th colspan="4" scope="rowgroup">{escape(label)}</th>'
            f'<td class="axis">{axis}</td><td></td><td></td></tr>'
        )
        for row in group:
            cells = [f"<td>{escape(cell)}</td>" for cell in row[2:6]]
            one = verdicts.get((metric.name, row.arm))
            cells.insert(3, f"<td>{scale.row(one) if scale and one else ''}</td>")
            lines.append(
                f'<tr><th scope="row">{escape(row.arm)}</th>{"".join(cells)}'
                f'<td class="{row.verdict.split()[0]}">{escape(row.verdict)}</td></tr>'
            )
        lines.append("</tbody>")
    lines.append("</table>")
    return "\n".join(lines)
