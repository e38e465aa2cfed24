"""Deep networks of sigmoids train with batch norm, and not without it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import of_arm, points
from normlab.claims.outcomes import course, ends, merged
from normlab.claims.setups import mnist_sigmoid
from normlab.claims.work import Work
from normlab.study import Study

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_FINAL = "final test accuracy"
_COURSE = "test accuracy"
_ALWAYS_ONE = 0.1135  # Accuracy of saying "1", the most frequent digit of the test images.
_LINEAR = 92.0  # In percent: about what a network without hidden layers gets to, from memory.
_GAIN = "batch − plain, final test accuracy"
_TRAINS = f"batch − {_LINEAR:g}%, final test accuracy"


def _study(quick: bool) -> Study:
    fields = {
        "name": "mnist-deep-sigmoid",
        "network": "mlp:" + ",".join(["100"] * 8),
        "lr": (0.1, 1.0) if quick else (0.01, 0.1, 1.0, 10.0),
        "epochs": 2 if quick else 10,
        "description": "Eight layers of 100 sigmoids on MNIST, with and without batch norm",
    }
    return mnist_sigmoid(quick).with_fields(fields)


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    comparison = work.compare(_study(work.quick))
    rows = merged([ends(comparison, {"final_test_accuracy": _FINAL}), course(comparison, _COURSE)])
    for seed in work.seeds:
        yield seed, rows[seed]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    # One that diverged has learned nothing.
    batch = [
        value if math.isfinite(value) else -math.inf for value in of_arm(frame, "batch", _FINAL)
    ]
    return {
        _GAIN: points(frame, _FINAL, "batch", "plain"),
        _TRAINS: [100 * value - _LINEAR for value in batch],
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    return lines(
        frame[frame["quantity"] == _COURSE],
        title="Eight layers of sigmoids; dashed: what saying the most frequent digit gets",
        x="steps",
        y=_COURSE,
        arms=["plain", "batch"],
        expected=_ALWAYS_ONE,
    )


CLAIM = Claim(
    name="deep-sigmoid",
    statement="Deep networks of sigmoids train with batch norm, and not without it.",
    source="Ioffe and Szegedy, 2015",
    metric=f"{_GAIN}; {_TRAINS}, in points.",
    published="Inception with sigmoids on ImageNet: 69.8% with batch norm, 0.1% without.",
    setup=(
        "MNIST, a perceptron with eight hidden layers of 100 sigmoids, SGD, batches of 60, 9,160 "
        "steps; learning rates 0.01, 0.1, 1 and 10, each arm at the one with the best final "
        "validation accuracy over the other seeds. Quick: 1,832 steps, rates 0.1 and 1."
    ),
    parts=(
        # Less would be to train somewhat better, and not to train or not to.
        Part(_GAIN, "more", 10.0, "points"),
        # Who is no better than a linear network has no use for the depth.
        Part(_TRAINS, "more", 0.5, "points"),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement=(
        "Both begin with torch's own first weights; with others a deep network of sigmoids may "
        "train without batch norm, which is not measured here."
    ),
)
