"""Batch norm whose outputs are made as unstable as it is said to keep them from being."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims import noise
from normlab.claims.charts import dots
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import contrast, of_arm
from normlab.claims.setups import fashion_fields
from normlab.claims.work import Work
from normlab.study import Study

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_ACCURACY = "test accuracy at the end"
_NETWORKS = {"": noise.steady_perceptron, "noisy ": noise.noisy_perceptron}
_ARMS = ("plain", "batch", "noisy plain", "noisy batch")
_BENEFIT = "accuracy of noisy batch norm − without batch norm"
_COST = "accuracy of noisy batch norm − batch norm"


def _study(prefix: str, quick: bool) -> Study:
    function = _NETWORKS[prefix]
    return Study(
        name=f"claims-{function.__name__.replace('_', '-')}",
        network=f"{function.__module__}:{function.__name__}",
        lr=(1 / 32, 1 / 8, 1 / 2, 2),
        **fashion_fields(quick, epochs=5, quick_epochs=2),
    )


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    ends = {
        f"{prefix}{arm}": rows["final_test_accuracy"].droplevel("arm")
        for prefix in _NETWORKS
        for arm, rows in work.compare(_study(prefix, work.quick)).outcomes().groupby("arm")
    }
    for seed in work.seeds:
        yield seed, [Row(arm, _ACCURACY, 0, float(ends[arm][seed])) for arm in _ARMS]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    plain, batch, _, noisy = (
        [100 * value for value in of_arm(frame, arm, _ACCURACY)] for arm in _ARMS
    )
    return {_BENEFIT: contrast(noisy, plain), _COST: contrast(noisy, batch)}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    title = "Final test accuracy, each arm at the rate that its other seeds chose"
    return dots(frame, title=title, x=_ACCURACY, arms=_ARMS)


# Half a point is what every study here takes for the largest difference that does not matter.
_MARGIN = 0.5

CLAIM = Claim(
    name="noisy-bn",
    statement="Batch norm helps as much when the distributions that it makes are kept unstable by "
    "noise, so it is not their stability that helps.",
    source="Santurkar, Tsipras, Ilyas and Mądry, 2018",
    metric=f"{_ACCURACY}, each arm at its own learning rate, in points.",
    published="Curves that lie on each other with noise and without, above those of the plain "
    "network, and no figure.",
    setup="Fashion-MNIST, 55,000 training images, a perceptron of 4×128 ReLUs, batch 128, SGD, "
    "rates 1/32, 1/8, 1/2 and 2, five epochs. The noise stands between norm and ReLU, in training "
    "alone: y·s + m, where s and m of a channel have centres that are redrawn at every step, from "
    "0.75 to 1.25 and from −0.5 to 0.5, and deviations of 0.1 from sample to sample. Shown too: "
    "that noise without batch norm. Quick: 15,000 images and two epochs.",
    parts=(
        Part(_BENEFIT, "more", _MARGIN, "points"),
        Part(_COST, "equal", _MARGIN, "points"),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
)
