"""Signals of batches that are too small, or not as large as they seem."""

from __future__ import annotations

import math
from collections.abc import Iterator

from normlab.doctor.finding import Finding, MissingError
from normlab.doctor.observations import Layer, Observations
from normlab.doctor.thresholds import THRESHOLDS, threshold

__all__ = ["accumulation", "batch_noise", "tiny_count", "unsynced"]

_SYNC = "model = normlab.SyncBatchNorm.convert_sync_batchnorm(model)"


def _group_norm(seen: Observations) -> str:
    """Return the line that puts group norm in the place of every batch norm."""
    groups = math.gcd(32, *(each.module.num_features for each in seen.layers.values()))
    to = f"group:{groups}" if groups > 1 else "layer"
    options = f"{to!r}, calibrate=batches{seen.options}"
    return f"model, report = normlab.convert(model, {options})  # then train"


def _most_worth(layer: Layer) -> float:
    """Return the upper limit of m_eff: the batches seen are a sample too.

    Over B batches the variance of a channel's mean has B − 1 degrees of freedom; those of other
    channels are not counted, as they are not independent.
    """
    from scipy.stats import chi2

    freedom = layer.batches - 1
    if not math.isfinite(layer.worth):
        return math.inf
    return layer.worth * float(chi2.ppf(threshold("noise confidence"), freedom)) / freedom


def batch_noise(seen: Observations) -> Iterator[Finding]:
    """Batches whose statistics are worth those of few independent values."""
    if seen.batches < 2:
        raise MissingError("two batches or more")
    for layer in seen.layers.values():
        worth = _most_worth(layer)
        if layer.held or worth >= threshold("noise"):
            continue
        bad = worth < threshold("noise error")
        yield Finding(
            "batch noise",
            layer.name,
            "error" if bad else "warning",
            "m_eff, the independent values that a batch is worth, at most (99%)",
            worth,
            threshold("noise error" if bad else "noise"),
            "if training has batches like these, it normalizes by statistics that are mostly noise",
            _group_norm(seen),
            THRESHOLDS["noise"].source,
        )


def _is_rest(layer: Layer) -> bool:
    """Tell whether the smallest batch is what was left over, and most are large enough."""
    sizes = sorted(each.n for each in layer.calls[0]) if layer.calls else []
    return bool(sizes) and sizes[len(sizes) // 2] >= threshold("count")


def tiny_count(seen: Observations) -> Iterator[Finding]:
    """Batches with few values per channel."""
    for layer in seen.layers.values():
        least = layer.least
        if layer.held or least >= threshold("count"):
            continue
        alone = least <= threshold("count error")
        yield Finding(
            "tiny count",
            layer.name,
            "error" if alone else "warning",
            "values per channel in the smallest batch",
            least,
            threshold("count error" if alone else "count"),
            "a single value has no variance, and training raises"
            if alone
            else "mean and variance of so few values are mostly noise",
            "loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)"
            if _is_rest(layer)
            else _group_norm(seen),
            THRESHOLDS["count"].source,
        )


def unsynced(seen: Observations) -> Iterator[Finding]:
    """Layers that each rank normalizes by its own small batch."""
    if seen.world_size < 2:
        raise MissingError("a process group of two ranks or more")
    for layer in seen.layers.values():
        kind = type(layer.module).__name__
        worth = _most_worth(layer)
        if layer.held or "Sync" in kind or worth >= threshold("noise"):
            continue
        yield Finding(
            "unsynced ranks",
            layer.name,
            "warning",
            f"m_eff of a batch on one of {seen.world_size} ranks, at most (99%)",
            worth,
            threshold("noise"),
            "each rank normalizes by a batch that is too small alone, while all ranks' would do",
            _SYNC,
            THRESHOLDS["noise"].source,
        )


def accumulation(seen: Observations) -> Iterator[Finding]:
    """Several updates of the statistics for each step of the optimizer."""
    if seen.steps is None:
        raise MissingError("steps=, the optimizer's steps so far")
    for layer in seen.layers.values():
        calls = max(len(layer.calls), 1)
        if layer.held or not seen.steps:
            continue
        updates = layer.tracked / (seen.steps * calls)
        whole = round(updates)
        # Other ratios are of models that were trained before, with other batches.
        if whole < 2 or abs(updates - whole) > 0.02:
            continue
        a = layer.module.momentum
        small = _most_worth(layer) < threshold("noise")
        yield Finding(
            "gradient accumulation",
            layer.name,
            "warning" if small else "information",
            "updates of the running statistics for each step",
            updates,
            1.0,
            "each micro-batch is normalized by itself: accumulated gradients are not those of the "
            "larger batch",
            _group_norm(seen)
            if small or a is None
            else f"{seen.at(layer)}.momentum = {1 - (1 - a) ** (1 / whole):.3g}",
            "pytorch-lightning issue 17446",
        )
