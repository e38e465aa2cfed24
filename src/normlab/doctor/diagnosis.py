"""A diagnosis: findings, what could not be measured, and each layer's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from normlab.doctor.finding import WEIGHTS, Finding

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Diagnosis", "LayerNumbers", "UnitNumbers"]

_SHOWN = 3


@dataclass(frozen=True)
class LayerNumbers:
    """What was measured of a batch norm layer; None where that was not possible.

    Attributes:
        layer: Qualified name.
        kind: Its class.
        channels: C.
        calls: In one forward pass.
        frozen: Whether its statistics are frozen.
        momentum: The weight of a new batch.
        updates: `num_batches_tracked`.
        values: Fewest in a channel of a batch.
        worth: m_eff, the independent values that a batch is worth.
        mean_off: 95th percentile over channels of |running mean − mean|, in deviations.
        variance_off: 95th percentile over channels of |ln(running variance / variance)|.
        gamma: Smallest, lower quartile, median, upper quartile and largest of γ.
    """

    layer: str
    kind: str
    channels: int
    calls: int
    frozen: bool
    momentum: float | None
    updates: int
    values: float | None
    worth: float | None
    mean_off: float | None
    variance_off: float | None
    gamma: tuple[float, float, float, float, float] | None


@dataclass(frozen=True)
class UnitNumbers:
    """What was measured of an activation.

    Attributes:
        place: The module that it is, or is called in.
        kind: relu, sigmoid or tanh.
        units: Channels.
        values: Seen of each.
        dead: Share of units that were always zero; None where it is no relu.
        saturated: Share of units on the flat parts for more than 95% of values; None where it is.
    """

    place: str
    kind: str
    units: int
    values: int
    dead: float | None
    saturated: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        findings: The heaviest first.
        not_measured: By signal, what it would need.
        numbers: Of each batch norm layer.
        units: Of each activation.
        batches: How many were seen.
        samples: How many were in them.
        asked: What was asked for, as `fixed` needs it again.
    """

    findings: tuple[Finding, ...]
    not_measured: dict[str, str]
    numbers: tuple[LayerNumbers, ...]
    units: tuple[UnitNumbers, ...]
    batches: int
    samples: int
    asked: Any = field(repr=False, compare=False)

    def count(self, weight: str) -> int:
        """Return how many findings have a weight."""
        return sum(each.weight == weight for each in self.findings)

    @property
    def summary(self) -> str:
        """How many findings there are, in one sentence."""
        of = f"{self.samples:,} samples in {self.batches:,} batches"
        counts = [(self.count(weight), weight) for weight in WEIGHTS]
        told = [
            f"{n} {weight}{'s' * (n != 1 and weight != 'information')}" for n, weight in counts if n
        ]
        return f"{', '.join(told) or 'No findings'}; {len(self.numbers)} batch norm layers, {of}"

    def groups(self) -> Iterator[tuple[Finding, list[Finding]]]:
        """Yield the findings that have one signal and weight, and the one farthest out first."""
        for _, group in groupby(self.findings, lambda each: (each.weight, each.signal)):
            ordered = sorted(group, key=_excess, reverse=True)
            yield ordered[0], ordered

    def frame(self) -> pd.DataFrame:
        """Return a row for each finding, with the fields of `Finding`."""
        import pandas as pd

        rows = [asdict(each) for each in self.findings]
        return pd.DataFrame(rows, columns=list(Finding.__dataclass_fields__))

    def layers(self) -> pd.DataFrame:
        """Return a row for each batch norm layer, with the fields of `LayerNumbers`."""
        import pandas as pd

        columns = list(LayerNumbers.__dataclass_fields__)
        return pd.DataFrame([asdict(each) for each in self.numbers], columns=columns)

    def activations(self) -> pd.DataFrame:
        """Return a row for each activation, with the fields of `UnitNumbers`."""
        import pandas as pd

        columns = list(UnitNumbers.__dataclass_fields__)
        return pd.DataFrame([asdict(each) for each in self.units], columns=columns)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, as `json.dumps(…, allow_nan=False)` takes them."""
        return {
            "summary": self.summary,
            "batches": self.batches,
            "samples": self.samples,
            "findings": [each.to_json() for each in self.findings],
            "not_measured": self.not_measured,
            "layers": [asdict(each) for each in self.numbers],
            "activations": [asdict(each) for each in self.units],
        }

    def __str__(self) -> str:
        lines = [self.summary]
        for first, group in self.groups():
            lines += ["", f"{first.weight}: {first.signal}{_where(group)}"]
            lines += [f"  {each}" for each in _told(group)]
            lines += [f"  {first.why}", f"  fix: {first.fix}", f"  source: {first.source}"]
        if self.not_measured:
            lines += ["", "Not measured, and what it would need:"]
            lines += [f"  {signal}: {needed}" for signal, needed in self.not_measured.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _excess(finding: Finding) -> float:
    return abs(finding.measured) / abs(finding.threshold) if finding.threshold else 0.0


def _where(group: list[Finding]) -> str:
    if len(group) > 1:
        return f" in {len(group)} layers"
    return f" in {group[0].layer}" if group[0].layer else ""


def _told(group: list[Finding]) -> Iterable[str]:
    for each in group[:_SHOWN]:
        name = f"{each.layer}: " if len(group) > 1 else ""
        yield f"{name}{each.quantity} {each.measured:.4g} (threshold {each.threshold:.4g})"
    if len(group) > _SHOWN:
        names = ", ".join(each.layer for each in group[_SHOWN:])
        yield f"and {names}" if len(group) <= 2 * _SHOWN else f"and {len(group) - _SHOWN} more"
