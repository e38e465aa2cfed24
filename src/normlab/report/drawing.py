"""Charts as drawings that stand in a page, and as data that its script draws again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Drawing", "draw", "figures", "packed"]

_DIGITS = 6  # Of a number in a chart: more than a pixel can show.

_POSITIONS = re.compile(r' (?:d|transform)="[^"]*"')
_PAST_A_PIXEL = re.compile(r"(\.\d\d)\d+")


class Drawing(NamedTuple):
    """A chart, drawn.

    Attributes:
        spec: Of Vega-Lite.
        svg: The same as a drawing, with its description for screen readers.
    """

    spec: dict[str, Any]
    svg: str

    @property
    def png(self) -> bytes:
        """The same as pixels, two for each unit."""
        import vl_convert

        return vl_convert.svg_to_png(self.svg, scale=2)


def draw(charts: Mapping[str, alt.TopLevelMixin]) -> dict[str, Drawing]:
    """Draw charts.

    Args:
        charts: By name; a name becomes that of a file, so it is of letters, digits, - and _.
    """
    import vl_convert

    drawings = {}
    for name, chart in charts.items():
        spec = chart.to_dict()
        # The drawing has one description, which stands for all of its parts.
        svg = vl_convert.vegalite_to_svg(
            spec | {"config": spec.get("config", {}) | {"aria": False}}
        )
        svg = _POSITIONS.sub(lambda found: _PAST_A_PIXEL.sub(r"\1", found[0]), svg)
        label = escape(_description(spec))
        svg = svg.replace("<g ", '<g aria-hidden="true" ', 1)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        drawings[name] = Drawing(spec, svg)
    return drawings


def figures(drawings: Mapping[str, Drawing]) -> str:
    """Return drawings as HTML: each has a box of its own, which the script fills again.

    A drawing that is wider than a phone scrolls in its box, so the keyboard has to reach that.
    """
    return "\n".join(
        f'<figure><div class="chart wide" id="chart-{escape(name)}" tabindex="0" role="group" '
        f'aria-label="{escape(_title(one.spec))}">{one.svg}</div></figure>'
        for name, one in drawings.items()
    )


def packed(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a specification with its data as columns, rounded to what can be seen.

    >>> packed({"datasets": {"a": [{"x": 1, "y": 0.12345678}, {"x": 2, "y": None}]}})
    {'datasets': {'a': {'x': [1, 2], 'y': [0.123457, None]}}}
    """
    return {**spec, "datasets": {name: _columns(rows) for name, rows in spec["datasets"].items()}}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_short(row.get(key)) for row in rows] for key in keys}


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _title(spec: dict[str, Any]) -> str:
    title = spec.get("title", "")
    return str(title["text"] if isinstance(title, dict) else title)


def _description(spec: dict[str, Any]) -> str:
    return str(spec.get("description") or _title(spec))
