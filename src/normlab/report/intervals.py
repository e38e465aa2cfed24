"""Differences with their intervals as small drawings, to stand in the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normlab.study import Metric, Verdict

__all__ = ["Scale"]

_WIDTH, _HEIGHT, _EDGE = 180, 20, 8
_LETTER = 7


@dataclass(frozen=True)
class Scale:
    """One scale for all rows of a metric.

    Colours are the text's own, so a drawing can stand on a light page and on a dark one. The
    numbers stand in the row too, so the drawings are hidden from screen readers.

    Attributes:
        metric: Whose differences are drawn.
        low: The least difference that has a place.
        high: The largest.
        margin: Differences that do not matter are from −margin to margin; None if none was
            declared.
    """

    metric: Metric
    low: float
    high: float
    margin: float | None

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Scale | None:
        """Return the scale on which all these have a place; None where nothing has one.

        Args:
            verdicts: Of one metric, and of one study or of several.
        """
        known = [one for one in verdicts if one.difference is not None]
        margins = [one.equivalence_margin for one in known if one.equivalence_margin is not None]
        ends = [0.0, *margins, *(-margin for margin in margins)]
        for one in known:
            ends += one.interval or (one.difference or 0.0,)
        low, high = min(ends), max(ends)
        if low == high:
            return None
        return cls(known[0].metric, low, high, max(margins, default=None))

    def row(self, verdict: Verdict) -> str:
        """Return the drawing of one: a bar for the interval, a dot for the mean, a line at 0."""
        if verdict.difference is None:
            return ""
        marks = self._ground(verdict.equivalence_margin)
        middle = _HEIGHT / 2
        if verdict.interval:
            start, end = map(self._place, verdict.interval)
            marks += _line(start, middle, end, middle, 'stroke-width="3"')
        at = self._place(verdict.difference)
        marks += f'<circle cx="{at:.1f}" cy="{middle:g}" r="4.5" fill="currentColor"/>'
        return _svg(marks)

    def axis(self) -> str:
        """Return the drawing that goes above the rows: the ends of the scale, and 0."""
        zero = self._place(0.0)
        marks = _text(zero, "middle", "0")
        for value, x, anchor in ((self.low, 0.0, "start"), (self.high, float(_WIDTH), "end")):
            text = self.metric.show(value, signed=True)
            if abs(x - zero) > _LETTER * (len(text) + 1):  # Or it would stand on the 0.
                marks += _text(x, anchor, text)
        return _svg(marks)

    def _ground(self, margin: float | None) -> str:
        ground = ""
        if margin is not None:
            start, end = self._place(-margin), self._place(margin)
            ground = (
                f'<rect x="{start:.1f}" y="0" width="{end - start:.1f}" height="{_HEIGHT}" '
                'fill="currentColor" opacity="0.15"/>'
            )
        zero = self._place(0.0)
        return ground + _line(zero, 0, zero, _HEIGHT, 'opacity="0.6"')

    def _place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _EDGE + share * (_WIDTH - 2 * _EDGE)


def _svg(marks: str) -> str:
    return (
        f'<svg class="interval" aria-hidden="true" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}">{marks}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}"'
    return f'<line {ends} stroke="currentColor" {style}/>'


def _text(x: float, anchor: str, text: str) -> str:
    return (
        f'<text x="{x:.1f}" y="14" font-size="11" text-anchor="{anchor}" fill="currentColor">'
        f"{text}</text>"
    )
