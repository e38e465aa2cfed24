"""Signals of what a model answers: in evaluation, by the batch, in parts and in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from normlab.doctor.finding import Finding, MissingError
from normlab.doctor.observations import Observations
from normlab.doctor.thresholds import THRESHOLDS, threshold

__all__ = ["by_class", "depends_on_batch", "gap", "order_of_data"]

_LABELS = "labels of classes, and an output of shape (N, C)"


def mcnemar_p(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p of McNemar's test, of two classifiers on the same samples.

    Under no difference each sample on which they differ favours either with probability ½.

    Source: McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or
    Percentages", 1947.

    >>> mcnemar_p(np.array([True] * 8), np.array([False] * 8))
    0.0078125
    """
    from scipy.stats import binomtest

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def gap(seen: Observations) -> Iterator[Finding]:
    """Evaluation that is worse than the same samples normalized by the batch."""
    if seen.answers is None:
        raise MissingError(_LABELS)
    if not seen.trained:
        raise MissingError("a trained model: nothing says that this one is; pass steps= if it is")
    evaluated, by_batch = seen.answers.evaluated, seen.answers.by_batch
    loss = float(by_batch.mean() - evaluated.mean())
    p = mcnemar_p(evaluated, by_batch)
    if loss <= threshold("gap") or p >= threshold("significance"):
        return
    bad = loss > threshold("gap error")
    yield Finding(
        "train/eval gap",
        "",
        "error" if bad else "warning",
        f"accuracy lost by running statistics, on {len(evaluated):,} samples (McNemar p {p:.2g})",
        loss,
        threshold("gap error" if bad else "gap"),
        "only the batch norms differ between the two, so their running statistics cost it",
        seen.recalibrate,
        THRESHOLDS["gap"].source,
    )


def depends_on_batch(seen: Observations) -> Iterator[Finding]:
    """Outputs in evaluation that change with what else is in the batch."""
    if isinstance(seen.part, str):
        raise MissingError(seen.part)
    if seen.part > threshold("part"):
        untracked = [each.name for each in seen.layers.values() if each.running is None]
        yield Finding(
            "evaluation depends on the batch",
            untracked[0] if untracked else "",
            "warning",
            "largest |f(half a batch) − f(batch)|, relative",
            seen.part,
            threshold("part"),
            f"an answer depends on the samples beside it, even in evaluation; {len(untracked)} "
            "batch norms keep no running statistics",
            "norm = normlab.BatchNorm2d(channels, track_running_stats=True)",
            THRESHOLDS["part"].source,
        )


def by_class(labels: Sequence[NDArray[np.int64]]) -> bool:
    """Tell whether batches have shares of classes that no random order gives.

    >>> by_class([np.zeros(50, int), np.ones(50, int)]), by_class([np.arange(50) % 2] * 2)
    (True, False)
    """
    from scipy.stats import chi2_contingency

    classes = np.unique(np.concatenate(list(labels)))
    if len(classes) < 2:
        return False
    table = np.array([[(each == label).sum() for label in classes] for each in labels])
    table = table[table.sum(1) > 0]
    return bool(chi2_contingency(table)[1] < threshold("order p"))


def order_of_data(seen: Observations) -> Iterator[Finding]:
    """Samples that come by class, so that a batch's statistics are its class's."""
    if seen.order_unknown:
        raise MissingError(seen.order_unknown)
    if seen.labels is None:
        raise MissingError(_LABELS)
    if seen.given is None or seen.answers is None:
        return
    change = float(seen.given.mean() - seen.answers.by_batch.mean())
    if abs(change) <= threshold("order"):
        return
    if mcnemar_p(seen.given, seen.answers.by_batch) >= threshold("significance"):
        return
    yield Finding(
        "order of the data",
        "",
        "warning",
        "accuracy by the batch's statistics, in this order less that with the samples mixed",
        change,
        threshold("order") if change > 0 else -threshold("order"),
        "batches of few classes have statistics that give the class away, in training alone",
        "loader = DataLoader(dataset, batch_size, shuffle=True)",
        THRESHOLDS["order"].source,
    )
