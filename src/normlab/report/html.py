"""The parts that every page is made of."""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

from normlab.report.charts import DARK

__all__ = ["page", "room", "section", "wide"]

_LARGEST = 1_985_000
"""Bytes of a page that can still be sent by mail."""


def room(main: str, specs: dict[str, Any]) -> int:
    """Return how many bytes are left in a page, for measurements, beside these.

    Args:
        main: The contents, as HTML.
        specs: Of the charts.
    """
    charts = json.dumps(specs, separators=(",", ":"))
    rest = (main, charts, _library(), _text("style.css"), _text("script.js"))
    return _LARGEST - sum(len(part.encode()) for part in rest)


def page(title: str, description: str, main: str, data: dict[str, Any]) -> str:
    """Return a whole page as text; nothing that it needs is fetched.

    Args:
        title: In plain text, as is the description.
        description: A line below the title.
        main: The contents, as HTML.
        data: What the script draws: `specs`, by the names of their figures, and more for curves.
    """
    return _template("page.html").substitute(
        title=escape(title),
        description=escape(description),
        style=_template("style.css").substitute(dark=_dark_rules()),
        main=main,
        # "<" could end the script element, or begin a comment in it.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        library=_library(),
        script=_text("script.js"),
    )


@cache
def _library() -> str:
    """Return the JavaScript that draws charts, nearly a megabyte of it."""
    import vl_convert

    # The library's stub does not know that the snippet may be left out.
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]


def section(heading: str, *parts: str) -> str:
    """Return a section with its heading, or nothing if none of the parts has anything in it."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def wide(table: str, label: str) -> str:
    """Return a table in a box that scrolls, by keyboard too, where the window is narrow."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{escape(label)}">{table}</div>'


def _dark_rules() -> str:
    """Return the rules that change the arms' colours on a dark page."""
    return "".join(
        f'  .chart [{what}="{light}"] {{ {what}: {dark}; }}\n'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ) + "".join(
        f'  .swatch[data-color="{light}"] {{ background: {dark} !important; }}\n'
        for light, dark in DARK.items()
    )


def _template(name: str) -> Template:
    return Template(_text(name))


@cache
def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")
