"""A claim: a published statement about normalization, and what would decide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from normlab.claims.work import Work

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["SEEDS", "Claim", "Part", "Row"]

SEEDS = tuple(range(10))
"""Ten, which find a difference of one standard deviation four times in five."""


class Row(NamedTuple):
    """A number that was measured.

    Attributes:
        arm: Of which network, or other alternative.
        quantity: What was measured.
        at: Where: a layer, a step, a rate; 0 where there is one place only.
        value: The number; not finite where a replica failed.
    """

    arm: str
    quantity: str
    at: float
    value: float


@dataclass(frozen=True)
class Part:
    """One number a seed, and what the claim says of it; declared before anything is measured.

    Attributes:
        name: What the number is, as a formula or in words. Positive is as the claim says.
        says: `more`: the mean is above zero. `equal`: it is within the margin. `exact`: every one
            is within the margin.
        margin: For `more` the smallest effect that would matter, for the others the largest that
            would not; in the number's own unit.
        unit: For people.
    """

    name: str
    says: Literal["more", "equal", "exact"]
    margin: float
    unit: str = ""


@dataclass(frozen=True)
class Claim:
    """A published statement, and how it is tested.

    Attributes:
        name: For the command line.
        statement: What is said, in one sentence.
        source: Who says it, and when.
        metric: What is measured, as a formula.
        published: What was printed beside it, or that nothing was.
        setup: On what it is tested; of a quick run, too.
        parts: What is decided. The claim is supported if every part is, and refuted if one is.
        measure: Yields the rows of one seed after another, of those that `Work` asks for.
        effects: From all the rows, with a column `seed`, the numbers of each part, one a seed in
            the order of the seeds, by the part's name.
        chart: Draws all the rows.
        disagreement: What to say plainly beside a verdict: of a text that says otherwise, or of
            what these numbers do not tell.
        seeds: On which it rests.
        is_cheap: Whether there are no fewer steps for a quick run, which then is a full one.
    """

    name: str
    statement: str
    source: str
    metric: str
    published: str
    setup: str
    parts: tuple[Part, ...]
    measure: Callable[[Work], Iterator[tuple[int, Iterable[Row]]]]
    effects: Callable[[pd.DataFrame], Mapping[str, Sequence[float]]]
    chart: Callable[[pd.DataFrame], alt.TopLevelMixin]
    disagreement: str = ""
    seeds: tuple[int, ...] = SEEDS
    is_cheap: bool = False
