"""What the doctor says: findings, and why a signal could not be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from normlab.doctor.observations import Observations

__all__ = ["WEIGHTS", "Finding", "MissingError", "Signal"]

WEIGHTS = ("error", "warning", "information")
"""From the heaviest to the lightest."""


@dataclass(frozen=True)
class Finding:
    """One diagnosis.

    Attributes:
        signal: Which of the doctor's signals it is.
        layer: Qualified name of the layer; "" where it is the model's as a whole.
        weight: "error" (results are wrong), "warning" (they probably suffer) or "information".
        quantity: What was measured, in words.
        measured: Its value.
        threshold: What it was held against.
        why: Why it matters, in one sentence.
        fix: A line of code.
        source: Where that is known from.
    """

    signal: str
    layer: str
    weight: str
    quantity: str
    measured: float
    threshold: float
    why: str
    fix: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; numbers that JSON has no word for as text."""
        plain = asdict(self)
        for key in ("measured", "threshold"):
            if not abs(plain[key]) < float("inf"):
                plain[key] = str(plain[key])
        return plain

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        return (
            f"{self.weight}: {self.signal}{where}: {self.quantity} {self.measured:.4g} "
            f"(threshold {self.threshold:.4g})"
        )


class MissingError(Exception):
    """A signal cannot be measured; says what it would need."""


Signal = Callable[[Observations], Iterator[Finding]]
"""Turns what was observed into findings, or raises `MissingError`."""
