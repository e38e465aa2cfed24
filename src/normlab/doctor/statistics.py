"""Signals of the statistics that layers keep, against those of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normlab.doctor.finding import Finding, MissingError
from normlab.doctor.observations import Layer, Observations
from normlab.doctor.thresholds import THRESHOLDS, threshold
from normlab.probes import Moments

__all__ = [
    "drift",
    "initial_value",
    "momentum_convention",
    "near_zero_variance",
    "never_updated",
    "not_finite",
    "shift_of_domain",
    "stale",
    "untouched",
]


def drift(layer: Layer) -> tuple[float, float] | None:
    """Return how far a layer's running statistics are from those of what it gets.

    Returns:
        The 95th percentiles over channels of z = |μr − μp| / √(σp² + ε) and of v = |ln σr²/σp²|,
        both variances with ε added; None if it keeps none, was not called, or nothing is finite.
    """
    if layer.running is None or layer.precise is None or layer.precise.n < 2:
        return None
    mean, var = layer.running
    eps = layer.module.eps
    z = (mean - layer.precise.mean).abs() / (layer.precise.var + eps).sqrt()
    v = ((var + eps) / (layer.precise.unbiased_var + eps)).log().abs()
    kept = z.isfinite() & v.isfinite() & (var >= 0)
    if not kept.any():
        return None
    return _percentile(z[kept]), _percentile(v[kept])


def _percentile(values: Tensor) -> float:
    return float(torch.quantile(values, 0.95))


_LEVELS = (("error", "stale error "), ("warning", "stale warning "), ("information", "stale "))


class _Excess(NamedTuple):
    """Which of z and v is the farther out, and how far."""

    weight: str
    by_mean: bool
    measured: float
    limit: float


def _excess(layer: Layer) -> _Excess | None:
    """Return how far a layer's statistics are out; None where chance or a tenth explains it."""
    found = drift(layer)
    if found is None:
        return None
    # By chance alone: a running average with momentum a has a/(2 − a) of a batch's variance, and
    # the mean over B batches 1/B of it; a batch is worth m_eff values. Above 1 the formula is none.
    a = layer.module.momentum
    average = 1 / max(layer.tracked, 1) if a is None else min(a, 1) / (2 - min(a, 1))
    worth = layer.worth if math.isfinite(layer.worth) else layer.least
    chance = threshold("stale errors") * math.sqrt((average + 1 / layer.batches) / worth)
    for weight, name in _LEVELS:
        limits = (
            max(threshold(f"{name}mean"), chance),
            max(threshold(f"{name}variance"), chance * math.sqrt(2)),
        )
        z, v = (measured / limit for measured, limit in zip(found, limits, strict=True))
        if max(z, v) > 1:
            which = 0 if z >= v else 1
            return _Excess(weight, which == 0, found[which], limits[which])
    return None


def untouched(layer: Layer) -> bool:
    """Tell whether running statistics are those that a layer begins with."""
    if layer.running is None or layer.tracked or layer.held:
        return False
    mean, var = layer.running
    return bool((mean == 0).all() and (var == 1).all())


def stale(seen: Observations) -> Iterator[Finding]:
    """Running statistics that are not those of what a layer gets."""
    if not seen.trained:
        raise MissingError("a trained model: nothing says that this one is; pass steps= if it is")
    shifted = {finding.layer for finding in shift_of_domain(seen)} if seen.reference else set()
    for layer in seen.layers.values():
        if layer.held or layer.name in shifted or untouched(layer):
            continue
        found = _excess(layer)
        if found is None:
            continue
        yield Finding(
            "stale statistics",
            layer.name,
            found.weight,
            "95th percentile of |running mean − mean| in deviations"
            if found.by_mean
            else "95th percentile of |ln(running variance / variance)|",
            found.measured,
            found.limit,
            "in evaluation the layer centers and scales by statistics that its inputs do not have",
            seen.recalibrate,
            THRESHOLDS["stale mean"].source,
        )


def initial_value(seen: Observations) -> Iterator[Finding]:
    """Running statistics that still hold some of the values that they began with."""
    if not seen.trained:
        raise MissingError("a trained model: nothing says that this one is; pass steps= if it is")
    for layer in seen.layers.values():
        a, steps = layer.module.momentum, layer.tracked or seen.steps or 0
        if layer.held or a is None or not 0 < a < 1 or not steps or untouched(layer):
            continue
        left = (1 - a) ** steps
        # Recalibrated statistics are counted by few batches too, and are right.
        if left > threshold("initial") and _excess(layer):
            enough = math.ceil(math.log(threshold("initial")) / math.log(1 - a))
            yield Finding(
                "momentum against steps",
                layer.name,
                "warning",
                f"share of the initial value after {steps} updates with momentum {a:g}",
                left,
                threshold("initial"),
                f"the running statistics need {enough} updates to forget mean 0 and variance 1",
                seen.recalibrate,
                THRESHOLDS["initial"].source,
            )


def momentum_convention(seen: Observations) -> Iterator[Finding]:
    """Momentum as other libraries have it, which weigh the old statistics by it."""
    for layer in seen.layers.values():
        a = layer.module.momentum
        if a is None or a < threshold("momentum") or layer.running is None or layer.held:
            continue
        meant = 1 - a if a < 1 else 0.1
        yield Finding(
            "momentum convention",
            layer.name,
            "error",
            "momentum",
            a,
            threshold("momentum"),
            "torch weighs the new batch by momentum, so the running statistics are those of little "
            "more than the last batch",
            f"{seen.at(layer)}.momentum = {meant:g}",
            THRESHOLDS["momentum"].source,
        )


def not_finite(seen: Observations) -> Iterator[Finding]:
    """NaN, infinity or a negative variance in buffers or parameters, or in what layers get."""
    faults = 0
    for layer in seen.layers.values():
        module = layer.module
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(module, name)
            if value is None:
                continue
            bad = ~value.isfinite()
            if name == "running_var":
                bad |= value < 0
            if not bad.any():
                continue
            faults += 1
            learned = name in ("weight", "bias")
            yield Finding(
                "not finite",
                layer.name,
                "error",
                f"channels of {name} that are NaN, infinite or negative"
                if name == "running_var"
                else f"channels of {name} that are NaN or infinite",
                float(bad.sum()),
                0.0,
                "every output of such a channel is worthless, and soon all that follows",
                "model.load_state_dict(earlier)  # a checkpoint from before"
                if learned
                else seen.recalibrate,
                "pytorch issues 88474 and 115500",
            )
    for where, count in seen.broken.items():
        if faults and count == seen.batches:
            continue  # It follows from a fault above.
        yield Finding(
            "not finite",
            where,
            "error",
            f"batches, of {seen.batches}, with NaN or infinity in what the layer gets",
            float(count),
            0.0,
            "one such value makes a batch's mean and variance worthless, and in training the "
            "running statistics for good",
            "batches = [each for each in batches if each[0].isfinite().all()]  # or mend layers "
            "before it",
            "pytorch issues 88474 and 115500",
        )


def never_updated(seen: Observations) -> Iterator[Finding]:
    """Running statistics that no batch has moved, in a trained model."""
    if not seen.trained:
        raise MissingError("a trained model: nothing says that this one is; pass steps= if it is")
    for layer in seen.layers.values():
        if not untouched(layer):
            continue
        called = layer.least < math.inf
        yield Finding(
            "never updated",
            layer.name,
            "error" if called else "information",
            "batches that moved the running statistics",
            0.0,
            0.0,
            "evaluation normalizes by mean 0 and variance 1, which are no data's"
            if called
            else "the layer is not called when the model runs",
            seen.recalibrate if called else _without(seen, layer),
            THRESHOLDS["initial"].source,
        )


def _without(seen: Observations, layer: Layer) -> str:
    parent, _, name = layer.name.rpartition(".")
    return f"delattr({seen.reached}.get_submodule({parent!r}), {name!r})  # if nobody needs it"


def near_zero_variance(seen: Observations) -> Iterator[Finding]:
    """Channels whose input is constant, and those that amplify what little there is."""
    for layer in seen.layers.values():
        if layer.running is None or untouched(layer):
            continue
        _, var = layer.running
        eps, gamma = layer.module.eps, layer.module.weight
        size = torch.ones_like(var) if gamma is None else gamma.detach().double().abs().cpu()
        low = (var >= 0) & (var < threshold("variance") * eps)
        gain = size / (var + eps).sqrt()
        amplified = low & (gain > threshold("gain"))
        if amplified.any():
            yield Finding(
                "near-zero variance",
                layer.name,
                "warning",
                f"largest gain |γ|/√(σ²+ε), of {int(amplified.sum())} channels with σ² < 10ε",
                float(gain[amplified].max()),
                threshold("gain"),
                "an input that hardly varies is blown up, and with it whatever differs elsewhere",
                f"{seen.at(layer)}.eps = 1e-3  # or drop the constant inputs",
                THRESHOLDS["gain"].source,
            )
        elif low.any():
            yield Finding(
                "near-zero variance",
                layer.name,
                "information",
                f"smallest running variance, of {int(low.sum())} channels with σ² < 10ε",
                float(var[low].min()),
                threshold("variance") * eps,
                "the channel's input is as good as constant, and the channel could be pruned",
                f"({seen.at(layer)}.running_var < {10 * eps:g}).nonzero()",
                THRESHOLDS["variance"].source,
            )


def shift_of_domain(seen: Observations) -> Iterator[Finding]:
    """Inputs that differ from the training domain's more than batches of that differ by chance."""
    if seen.reference is None or seen.evaluated is None:
        raise MissingError("reference=, batches of the training domain")
    if min(map(len, seen.reference.values())) < threshold("shift batches"):
        raise MissingError(f"reference= of {threshold('shift batches'):g} batches or more")
    compared = False
    for layer in seen.layers.values():
        if layer.running is None or layer.name not in seen.evaluated:
            continue
        theirs = seen.reference.get(layer.name, [])
        sizes = {each.n for each in theirs}
        ours = [each for each in seen.evaluated[layer.name] if each.n in sizes]
        if not ours:
            continue
        compared = True
        distances = [_distance(layer, each) for each in theirs]
        limit = float(np.quantile(distances, threshold("shift")))
        distance = float(np.median([_distance(layer, each) for each in ours]))
        if distance > limit:
            yield Finding(
                "shift of domain",
                layer.name,
                "warning",
                "median over batches of the divergence from the running statistics, in nats",
                distance,
                limit,
                "the inputs are not of the domain that the statistics are of (look at the share of "
                "each class first)",
                f"model, report = normlab.adapt(model, batches{seen.options})",
                THRESHOLDS["shift"].source,
            )
    if not compared:
        raise MissingError("reference= of batches of the same size as the others")


def _distance(layer: Layer, batch: Moments) -> float:
    """Return ½[ln(σr²/σt²) + (σt² + (μt − μr)²)/σr² − 1], the mean over channels.

    Source: the divergence of normal distributions, KL(batch ‖ running).
    """
    assert layer.running is not None
    (mean, var), eps = layer.running, layer.module.eps
    ours, theirs = batch.var + eps, var + eps
    each = (theirs / ours).log() + (ours + (batch.mean - mean).square()) / theirs - 1
    return float(each.mean() / 2)
