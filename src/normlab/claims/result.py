"""What is known of a claim: the numbers, the evidence and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from normlab.claims.claim import Claim
from normlab.claims.evidence import Evidence, Word, overall, weigh
from normlab.claims.ledger import Kept

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """A claim with what was measured of it.

    Attributes:
        claim: Which.
        quick: Whether with fewer steps.
        kept: By seed.
    """

    claim: Claim
    quick: bool
    kept: Mapping[int, Kept]

    @property
    def complete(self) -> bool:
        """Whether every seed is there."""
        return set(self.claim.seeds) <= set(self.kept)

    @property
    def seconds(self) -> float:
        """How long the measuring took."""
        return sum(each.seconds for each in self.kept.values())

    @property
    def measured(self) -> str:
        """When the last seed was measured, ISO 8601; empty if none was."""
        return max((each.measured for each in self.kept.values()), default="")

    def frame(self) -> pd.DataFrame:
        """Return every number: columns `seed`, `arm`, `quantity`, `at`, `value`."""
        import pandas as pd

        rows = [(seed, *row) for seed, kept in self.kept.items() for row in kept.rows]
        return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])

    @cached_property
    def evidence(self) -> list[Evidence]:
        """What was found about each part; empty before every seed is there.

        Stopping when one likes what one sees finds effects where there are none.
        """
        if not self.complete:
            return []
        effects = self.claim.effects(self.frame())
        intervals = sum(part.says != "exact" for part in self.claim.parts)
        return [weigh(part, effects[part.name], max(intervals, 1)) for part in self.claim.parts]

    @property
    def verdict(self) -> Word | None:
        """The word; None before every seed is there."""
        return overall(self.evidence) if self.complete else None

    def chart(self) -> alt.TopLevelMixin:
        """Return the figure."""
        return self.claim.chart(self.frame())

    def summary(self) -> dict[str, Any]:
        """Return it as plain dicts and lists, ready for JSON."""
        claim = self.claim
        words = ("name", "statement", "source", "metric", "published", "setup", "disagreement")
        return {
            **{word: getattr(claim, word) for word in words},
            "quick": self.quick,
            "seeds": sorted(self.kept),
            "seconds": round(self.seconds, 3),
            "measured": self.measured,
            "verdict": self.verdict,
            "evidence": [_plain(each) for each in self.evidence],
        }

    def __str__(self) -> str:
        claim = self.claim
        quick = ", quick: fewer steps" if self.quick else ""
        n = len(self.kept)
        word = self.verdict or f"{n} of {len(claim.seeds)} seeds measured"
        lines = [
            f"{claim.name}: {word} ({n} seeds{quick})" if self.verdict else f"{claim.name}: {word}",
            f"  {claim.statement} ({claim.source})",
            *(f"  {told(each)}" for each in self.evidence),
            f"  published: {claim.published}",
        ]
        if claim.disagreement and self.verdict:
            lines.append(f"  {claim.disagreement}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import vl_convert

        if not self.kept:
            return f"<pre>{escape(str(self))}</pre>"
        picture = vl_convert.vegalite_to_svg(self.chart().to_dict())
        return f"<pre>{escape(str(self))}</pre>{picture}"


def told(evidence: Evidence) -> str:
    """Return what was found about a part, in one line."""
    part, unit = evidence.part, f" {evidence.part.unit}" if evidence.part.unit else ""
    if part.says == "exact":
        worst = evidence.reason if evidence.mean is None else f"at most {evidence.mean:.2g}{unit}"
        return f"{part.name}: {worst}, asked {part.margin:g}"
    matters = "matters from" if part.says == "more" else "does not matter up to"
    found = evidence.reason
    if evidence.interval is not None and evidence.mean is not None:
        low, high = evidence.interval
        found = (
            f"{signed(evidence.mean)}{unit} ({signed(low)} to {signed(high)}, "
            f"{evidence.confidence * 100:.3g}%)"
        )
    return f"{part.name}: {found}; {matters} {part.margin:g}: {evidence.word}"


def signed(value: float) -> str:
    """Return a number with its sign and three digits that mean something.

    >>> signed(-0.012345), signed(1234.5)
    ('−0.0123', '+1,234')
    """
    digits = 0 if abs(value) >= 1000 else 3
    text = f"{value:+,.0f}" if not digits else f"{value:+#.3g}".rstrip(".")
    return text.replace("-", "−")


def _plain(evidence: Evidence) -> dict[str, Any]:
    fields = asdict(evidence)
    part = fields.pop("part")
    fields["interval"] = list(evidence.interval) if evidence.interval else None
    return {**part, **fields}
