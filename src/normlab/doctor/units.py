"""Signals of units that do nothing: dead, saturated, or scaled away."""

from __future__ import annotations

from collections.abc import Iterator

from normlab.doctor.finding import Finding, MissingError
from normlab.doctor.observations import Observations
from normlab.doctor.thresholds import THRESHOLDS, threshold

__all__ = ["dead_units", "gamma_collapse", "saturated_units"]


def dead_units(seen: Observations) -> Iterator[Finding]:
    """Units that a ReLU gave zero for every value."""
    places = {place: units for place, units in seen.units.items() if units.kind == "relu"}
    if not places:
        raise MissingError("a ReLU")
    enough = {
        place: each for place, each in places.items() if each.values >= threshold("dead values")
    }
    if not enough:
        raise MissingError(f"{threshold('dead values'):,.0f} samples or more")
    for place, units in enough.items():
        share = float(units.silent.double().mean())
        if share <= threshold("dead"):
            continue
        bad = share > threshold("dead error")
        yield Finding(
            "dead units",
            place,
            "error" if bad else "warning",
            f"share of units that were zero for {units.values:,} values each",
            share,
            threshold("dead error" if bad else "dead"),
            "a unit that is always zero gets no gradient, and does not come back by itself",
            "optimizer.param_groups[0]['lr'] /= 10  # and train again; look at β/γ before it",
            THRESHOLDS["dead"].source,
        )


def saturated_units(seen: Observations) -> Iterator[Finding]:
    """Units of a sigmoid or tanh that are nearly always on its flat parts."""
    inner = {
        place: units
        for place, units in seen.units.items()
        if units.kind != "relu" and place not in seen.flow.gates
    }
    if not inner:
        raise MissingError("a sigmoid or tanh inside the model")
    for place, units in inner.items():
        often = units.flat > threshold("saturated share") * units.values
        share = float(often.double().mean())
        if share > threshold("saturated"):
            yield Finding(
                "saturated units",
                place,
                "warning",
                f"share of units flat on more than 95% of {units.values:,} values",
                share,
                threshold("saturated"),
                "where the activation is flat hardly any gradient passes",
                "norm = normlab.BatchNorm1d(width)  # before the activation; or other first values",
                THRESHOLDS["saturated"].source,
            )


def gamma_collapse(seen: Observations) -> Iterator[Finding]:
    """Layers that scale many channels to nothing.

    The last norm of a residual branch is exempt: its γ may begin at zero, and a branch that stays
    closed is what the network chose.
    """
    for layer in seen.layers.values():
        gamma = layer.module.weight
        if gamma is None or layer.name in seen.flow.added:
            continue
        share = float((gamma.detach().abs() < threshold("collapse gamma")).double().mean())
        if share > threshold("collapse"):
            yield Finding(
                "γ collapse",
                layer.name,
                "warning",
                "share of channels with |γ| < 0.01",
                share,
                threshold("collapse"),
                "such channels carry nothing but β, and the gradient of what feeds them vanishes",
                "groups = [{'params': others}, {'params': norms, 'weight_decay': 0.0}]",
                THRESHOLDS["collapse"].source,
            )
