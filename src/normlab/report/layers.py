"""The layers of a study's networks, and what their norms learned, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LayersTable", "layers_html"]

_HEADINGS = ("layer", "kind", "output", "parameters")
_LEARNED = ("γ", "β")


def layers_html(frame: pd.DataFrame) -> str:
    """Return the table of `Comparison.layers()` as HTML."""
    headings = (*_HEADINGS, *_LEARNED)
    lines = ["<table>", "<caption>The layers of each arm's network</caption>", "<thead><tr>"]
    lines += [f'<th scope="col">{escape(heading)}</th>' for heading in headings]
    lines.append("</tr></thead>")
    for arm, rows in _arms(frame):
        lines.append(f'<tbody><tr><th colspan="6" scope="rowgroup">{escape(arm)}</th></tr>')
        for name, *cells in rows:
            texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{texts}</tr>')
        lines.append("</tbody>")
    return "\n".join([*lines, "</table>"])


class LayersTable:
    """The same for a terminal; what was learned stands in it if something was.

    Args:
        frame: What `Comparison.layers()` returns, or the columns of it that a study alone has.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console, options
        for arm, rows in _arms(self._frame):
            learned = any(cell for row in rows for cell in row[4:])
            headings = (*_HEADINGS, *(_LEARNED if learned else ()))
            table = Table(title=Text(arm), title_justify="left", box=None, pad_edge=False)
            for i, heading in enumerate(headings):
                table.add_column(heading, justify="right" if i == 3 else "left", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row[: len(headings)]))
            yield table


def _arms(frame: pd.DataFrame) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for arm, rows in frame.groupby("arm", sort=False):
        yield str(arm), [_cells(row) for row in rows.to_dict("records")]


def _cells(row: Mapping[Any, Any]) -> tuple[str, ...]:
    return (
        row["layer"],
        row["kind"],
        "×".join(map(str, row["shape"])),
        f"{row['parameters']:,}" if row["parameters"] else "",
        *(_range(row, name) for name in ("weight", "bias")),
    )


def _range(row: Mapping[Any, Any], name: str) -> str:
    mean, low, high = (row.get(f"{name}_{end}", math.nan) for end in ("mean", "low", "high"))
    if math.isnan(mean):
        return ""
    return f"{mean:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")
