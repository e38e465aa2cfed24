"""The doctor: observe a copy of a model, let every signal look, and mend what is safe to mend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parameter import is_lazy

from normlab.doctor import batchsize, behaviour, statistics, structure, units
from normlab.doctor.batches import checked, mixed
from normlab.doctor.diagnosis import Diagnosis, LayerNumbers, UnitNumbers
from normlab.doctor.finding import WEIGHTS, Finding, MissingError, Signal
from normlab.doctor.observations import Layer, Observations
from normlab.doctor.observe import Loss, Observer
from normlab.doctor.thresholds import threshold
from normlab.errors import InputError
from normlab.probes import Units
from normlab.streams import generators_kept, stream
from normlab.surgery.models import Forward, batch_norms, copy_of

__all__ = ["SIGNALS", "Asked", "diagnose", "examine"]

SIGNALS: dict[str, Signal] = {
    "not finite": statistics.not_finite,
    "never updated": statistics.never_updated,
    "momentum convention": statistics.momentum_convention,
    "momentum against steps": statistics.initial_value,
    "stale statistics": statistics.stale,
    "train/eval gap": behaviour.gap,
    "shift of domain": statistics.shift_of_domain,
    "tiny count": batchsize.tiny_count,
    "batch noise": batchsize.batch_noise,
    "unsynced ranks": batchsize.unsynced,
    "gradient accumulation": batchsize.accumulation,
    "order of the data": behaviour.order_of_data,
    "evaluation depends on the batch": behaviour.depends_on_batch,
    "dead units": units.dead_units,
    "saturated units": units.saturated_units,
    "γ collapse": units.gamma_collapse,
    "near-zero variance": statistics.near_zero_variance,
    "gradient explosion": structure.explosion,
    "shared layer": structure.shared_layer,
    "batch norm on logits": structure.on_logits,
    "dropout before batch norm": structure.dropout_before,
    "frozen yet updating": structure.frozen_yet_updating,
    "decay on γ and β": structure.weight_decay,
    "redundant bias": structure.redundant_bias,
}
"""Every signal, causes before what they cause."""


@dataclass(frozen=True)
class Asked:
    """What a diagnosis is of.

    Attributes:
        model: The user's.
        batches: That it is run on.
        mixed: Their samples in random order, where they come by class.
        forward: Runs it on a batch.
        device: What tensors in a batch are moved to.
        loss: Of output and labels.
        decay: By parameter, the optimizer's weight decay; None without one.
        steps: Of the optimizer so far.
        reference: Batches of the training domain.
        reached: How the user's code reaches the model: `model`, or `model.module` of a wrapper.
    """

    model: nn.Module
    batches: Iterable[Any]
    mixed: Iterable[Any] | None = None
    forward: Forward | None = None
    device: torch.device | str | None = None
    loss: Loss | None = None
    decay: dict[str, float] | None = None
    steps: int | None = None
    reference: Iterable[Any] | None = None
    reached: str = "model"


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int | None = None,
    reference: Iterable[Any] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Diagnosis:
    """Measure what goes wrong with a model's batch norms; see `normlab.diagnose`.

    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, momentum=0.99))
    >>> found = diagnose(model, [torch.randn(64, 4, generator=stream(0))] * 4)
    >>> [(finding.signal, finding.layer) for finding in found.findings]
    [('momentum convention', '1')]
    """
    reached = "model"
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model, reached = model.module, f"{reached}.module"
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # What torch.compile was given.
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise InputError(f"steps={steps!r}: expected a whole number, of the optimizer's steps")
    if not batch_norms(model):
        raise InputError(
            f"{type(model).__name__} has no batch norm layers: there is nothing to diagnose"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{name} has no shape yet: run the model on a batch once")
    if reference is not None:
        checked(reference, "reference")
        if isinstance(batches, Iterator):
            raise InputError("with reference=, batches must be such as can be gone through again")
    decay = None if optimizer is None else _decay(model, optimizer)
    found = checked(batches)
    return examine(
        Asked(model, found, None, forward, device, loss, decay, steps, reference, reached)
    )


def examine(asked: Asked) -> Diagnosis:
    """Observe a copy of the model, and let every signal look."""
    observer = Observer(copy_of(asked.model), asked.forward, asked.device, asked.loss)
    with generators_kept():  # A loader draws from them too.
        seen = observer.observe(asked.batches)
        seen, asked = _in_random_order(observer, asked, seen)
        seen.steps, seen.decay = asked.steps, asked.decay
        seen.reached, seen.options = asked.reached, _options(asked)
        if asked.reference is not None:
            seen.reference = observer.evaluate(asked.reference, "reference")
            seen.evaluated = observer.evaluate(asked.batches)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seen.world_size = torch.distributed.get_world_size()
    findings: list[Finding] = []
    missing = {}
    for name, signal in SIGNALS.items():
        try:
            findings += signal(seen)
        except MissingError as error:
            missing[name] = str(error)
    findings.sort(key=lambda each: WEIGHTS.index(each.weight))
    return Diagnosis(
        tuple(findings),
        missing,
        tuple(map(_layer_numbers, seen.layers.values())),
        tuple(_unit_numbers(place, each) for place, each in seen.units.items()),
        seen.batches,
        seen.samples,
        asked,
    )


def _in_random_order(
    observer: Observer, asked: Asked, seen: Observations
) -> tuple[Observations, Asked]:
    """Observe again with the samples mixed if they come by class.

    The statistics of batches of one class would otherwise look like faults of the layers.
    """
    if seen.labels is None or not behaviour.by_class(seen.labels):
        return seen, asked
    used_up = isinstance(asked.batches, Iterator)
    found = None if used_up else mixed(asked.batches, stream(0, "doctor", "order"))
    if found is None:
        seen.order_unknown = "batches of tensors, of one structure, that can be gone through again"
        return seen, asked
    other = observer.observe(found.batches)
    if seen.answers is not None and len(seen.answers.by_batch) == len(found.order):
        other.given = seen.answers.by_batch[found.order]
    else:
        other.order_unknown = "an output of shape (N, C), and finite values, of every batch"
    return other, replace(asked, mixed=found.batches)


def _options(asked: Asked) -> str:
    """Return the arguments of a fix that say how the model is run."""
    device = "" if asked.device is None else f", device={str(asked.device)!r}"
    return ("" if asked.forward is None else ", forward=forward") + device


def _decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    decays = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: decays.get(id(each), 0.0) for name, each in model.named_parameters()}


def _layer_numbers(layer: Layer) -> LayerNumbers:
    module, found = layer.module, statistics.drift(layer)
    gamma = None
    if module.weight is not None and bool(module.weight.isfinite().all()):
        ends = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
        low, *middle, high = module.weight.detach().double().cpu().quantile(ends).tolist()
        gamma = (low, middle[0], middle[1], middle[2], high)
    return LayerNumbers(
        layer.name,
        type(module).__name__,
        module.num_features,
        len(layer.calls),
        layer.held,
        module.momentum,
        layer.tracked,
        layer.least if layer.least < float("inf") else None,
        layer.worth if layer.worth == layer.worth else None,
        found[0] if found else None,
        found[1] if found else None,
        gamma,
    )


def _unit_numbers(place: str, each: Units) -> UnitNumbers:
    relu = each.kind == "relu"
    often = each.flat > threshold("saturated share") * each.values
    return UnitNumbers(
        place,
        each.kind,
        len(each.silent),
        each.values,
        float(each.silent.double().mean()) if relu and each.values else None,
        float(often.double().mean()) if not relu and each.values else None,
    )
