"""A thousand training samples are enough to estimate the statistics of evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.parallel import share_out
from normlab.claims.trained import SETUP, accuracy, batches, fashion, trained
from normlab.claims.work import Work
from normlab.streams import stream
from normlab.surgery import recalibrate
from normlab.training import Replica

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_LR = 0.1
_BATCH = 100
_SAMPLES = (100, 200, 500, 1_000, 2_000, 5_000, 10_000, 55_000)
_ALL = _SAMPLES[-1]
_PRECISE, _AVERAGE = "estimated anew", "running average of training"


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    return share_out(work, _seen, work.folder)


def _seen(seed: int, folder: Path) -> list[Row]:
    splits = fashion()
    test, train = splits.indices["test"], splits.indices["train"]
    network = trained(folder, Replica("batch", _LR, seed))
    rows = [Row(_AVERAGE, "accuracy", n, accuracy(network, test)) for n in (100, _ALL)]
    order = torch.randperm(len(train), generator=stream(seed, "claims", "precise-bn"))
    for n in _SAMPLES:
        # An iterator: there is no second pass to measure what is known here.
        precise, _ = recalibrate(network, iter(batches(train[order[:n]], _BATCH)))
        rows.append(Row(_PRECISE, "accuracy", n, accuracy(precise, test)))
    return rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    precise = frame[frame["arm"] == _PRECISE].pivot(index="seed", columns="at", values="value")
    lost = 100 * (precise.sub(precise[_ALL], axis=0))
    return {part.name: lost[n].tolist() for part, n in zip(_PARTS, (1_000, 10_000), strict=True)}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame,
        title="Test accuracy with statistics of so many training samples",
        x="samples",
        y="test accuracy",
        arms=[_AVERAGE, _PRECISE],
        log_x=True,
    )


# A quarter of a point is half of what studies here call a difference that does not matter.
_PARTS = (
    Part("accuracy with 1,000 samples − with all", "equal", 0.25, "points"),
    Part("accuracy with 10,000 samples − with all", "equal", 0.25, "points"),
)

CLAIM = Claim(
    name="precise-bn",
    statement="A thousand training samples are enough to estimate the statistics of evaluation.",
    source="Wu and Johnson, 2021",
    metric="Test accuracy after batch norm's statistics were estimated anew from n samples, the "
    "weights as they were, less that after 55,000 samples.",
    published="Accuracy hardly changes from about a thousand samples on (a plot).",
    setup=f"{SETUP}, a rate of {_LR}. Statistics from batches of {_BATCH} images, n from 100 to "
    "55,000.",
    parts=_PARTS,
    measure=_measure,
    effects=_effects,
    chart=_chart,
    is_cheap=True,
)
