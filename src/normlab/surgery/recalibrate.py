"""Running statistics, estimated anew over batches, or moved toward those of another domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.errors import InputError
from normlab.surgery.estimation import Estimate, estimate
from normlab.surgery.freeze import is_frozen
from normlab.surgery.models import Forward, batch_norms, buffers_kept, copy_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Drift", "Recalibrated", "RecalibrationReport", "adapt", "recalibrate"]

PRIOR_SAMPLES = 16
"""Samples that the old statistics are worth in `adapt`."""


@dataclass(frozen=True)
class Drift:
    """How far a layer's running statistics are from what it gets.

    With the mean μ and the unbiased variance σ² of what it gets, for each channel
    `z = |running_mean − μ| / √(σ² + ε)` and `v = |ln((running_var + ε) / (σ² + ε))|`.

    Attributes:
        z95: The 95th percentile of z over channels.
        z: The largest z, in standard deviations.
        v: The largest v; 0.69 is a variance that is off by a factor of two.
    """

    z95: float
    z: float
    v: float


@dataclass(frozen=True)
class Recalibrated:
    """What was done to a layer.

    Attributes:
        batches: That were used for it.
        samples: The sum of the first dimensions of its inputs.
        count: Values per channel.
        weight: Of the estimate in the new statistics; 1 for `recalibrate`.
        before: Of the old statistics, from the estimate.
        after: Of the new statistics, from what the layer gets in eval mode with them; None if that
            was not measured.
    """

    batches: int
    samples: int
    count: int
    weight: float
    before: Drift
    after: Drift | None


@dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate` or `adapt` did. Keys are qualified names, "" for the model itself.

    Attributes:
        layers: What was done to each layer.
        left: Why a batch norm layer was left as it was.
        skipped: Batches that were not finite, of layers with a `finite_guard` that got any.
        batches: That the model was run on.
        stopped_early: Whether the tolerance was met, so that no more batches were asked for.
    """

    layers: dict[str, Recalibrated]
    left: dict[str, str]
    skipped: dict[str, int]
    batches: int
    stopped_early: bool

    def __str__(self) -> str:
        end = ", the tolerance met" if self.stopped_early else ""
        in_part = any(each.weight < 1 for each in self.layers.values())
        lines = [
            f"{len(self.layers)} batch norm layers {'adapted' if in_part else 'recalibrated'} over "
            f"{self.batches} batches{end}; {len(self.left)} left as they were"
        ]
        for name, each in self.layers.items():
            after = f", after {_text(each.after)}" if each.after else ""
            weight = f", weight {each.weight:.2g}" if in_part else ""
            skipped = f", {self.skipped[name]} batches skipped" if name in self.skipped else ""
            lines.append(
                f"  {name or 'the model'}: {each.samples} samples{skipped}{weight}; "
                f"before {_text(each.before)}{after}"
            )
        lines += [f"  {name or 'the model'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    def frame(self) -> pd.DataFrame:
        """Return a row for each layer that was recalibrated; what was not measured is NaN."""
        import pandas as pd

        unknown = Drift(math.nan, math.nan, math.nan)
        rows = []
        for name, each in self.layers.items():
            row: dict[str, Any] = {"layer": name, "batches": each.batches, "samples": each.samples}
            row |= {"count": each.count, "weight": each.weight}
            for when, drift in (("before", each.before), ("after", each.after or unknown)):
                row |= {f"{key}_{when}": value for key, value in vars(drift).items()}
            rows.append(row)
        keys = [f"{key}_{when}" for when in ("before", "after") for key in ("z95", "z", "v")]
        return pd.DataFrame(rows, columns=["layer", "batches", "samples", "count", "weight", *keys])


def _text(drift: Drift) -> str:
    return f"z {drift.z:.2g}, v {drift.v:.2g}"


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    dropout: bool = False,
    tolerance: float | None = None,
    process_group: Any = None,
    inplace: bool = False,
) -> tuple[nn.Module, RecalibrationReport]:
    """Estimate the running statistics of a model's batch norm layers anew.

    The mean and variance of a layer become those of all values that it gets over the batches, each
    value with the same weight; `running_var` holds the unbiased variance, and
    `num_batches_tracked` the number of batches that were used. The model is in eval mode
    meanwhile, and the layers in training mode, so that each batch is normalized by its own
    statistics: larger batches are better, and those of training are right. In eval mode layers
    then get something slightly different. How much is measured by a second pass, if `batches` is
    no iterator, and told in the report; who gives `iter(batches)` saves its time.

    Left as they are: layers without running statistics, layers that are not called, and frozen
    ones, by `freeze` or in eval mode while the model is in training mode. With a mask or lengths,
    of normlab's layers, only what is real counts. A layer with a `finite_guard` skips batches that
    are not finite. Hooks see the passes. A `SyncBatchNorm` talks to other ranks in each, so that
    these need as many batches.

    Args:
        model: The user's.
        batches: Tensors; tuples or lists whose first is what the model gets; mappings of its
            keywords; or anything that `forward` knows.
        forward: A function of the model and a batch that runs it.
        device: What tensors in a batch are moved to.
        dropout: Let dropout layers drop, as in training. The global generators are set back.
        tolerance: Stop, after 8 batches or more, where the standard error of every channel's mean,
            as the spread of batch means tells it, is at most this much of its standard deviation;
            0.01, say. None uses every batch. The batches must be shuffled.
        process_group: Merge the moments over its ranks, which may have unequal numbers of batches.
        inplace: Change the model itself and not a copy.

    Returns:
        The model, and what was done.

    Raises:
        InputError: There is no batch, or a single value per channel; a layer without a
            `finite_guard` gets what is not finite; the statistics do not fit a buffer's type.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.

    >>> batches = [torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[3.0], [8.0]])]
    >>> model, report = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), batches)
    >>> model[0].running_mean, model[0].running_var
    (tensor([4.]), tensor([8.5000]))
    >>> print(report)
    1 batch norm layers recalibrated over 2 batches; 0 left as they were
      0: 5 samples; before z 1.4, v 2.1, after z 0, v 0
    """
    options = {"forward": forward, "device": device, "process_group": process_group}
    return _renewed(
        copy_of(model, inplace=inplace),
        batches,
        None,
        {**options, "dropout": dropout, "tolerance": tolerance},
    )


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    weight: float | Callable[[int], float] | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    inplace: bool = False,
) -> tuple[nn.Module, RecalibrationReport]:
    """Move the running statistics of a model's batch norm layers toward those of another domain.

    They become `(1 − w)·old + w·estimated`, mean and variance alike, with the estimate that
    `recalibrate` makes; it leaves the same layers as they are. `num_batches_tracked` stays.

    Args:
        model: The user's.
        batches: From the other domain; no labels are needed.
        weight: w, from 0 to 1, or a function of n that returns it, where n is the number of samples
            (the sum of the first dimensions of a layer's inputs); n / (n + 16) by default.
        forward: A function of the model and a batch that runs it.
        device: What tensors in a batch are moved to.
        process_group: Merge the moments over its ranks.
        inplace: Change the model itself and not a copy.

    Returns:
        The model, and what was done.

    Raises:
        InputError: As in `recalibrate`; the weight is not from 0 to 1; old statistics are not
            finite.

    Source: Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", 2020, equation 3, with N = 16.

    >>> model, _ = adapt(nn.Sequential(nn.BatchNorm1d(1)), [torch.tensor([[1.0], [3.0]])], 0.5)
    >>> model[0].running_mean, model[0].running_var
    (tensor([1.]), tensor([1.5000]))
    """
    options = {"forward": forward, "device": device, "process_group": process_group}
    if weight is None:
        weight = _default_weight
    elif not callable(weight):
        _weight_of(weight, 0)  # Before anything is run.
    return _renewed(copy_of(model, inplace=inplace), batches, weight, options)


def _default_weight(samples: int) -> float:
    return samples / (samples + PRIOR_SAMPLES)


_Statistics = dict[str, dict[str, Tensor]]


def _renewed(
    model: nn.Module,
    batches: Iterable[Any],
    weight: float | Callable[[int], float] | None,
    options: dict[str, Any],
) -> tuple[nn.Module, RecalibrationReport]:
    layers = batch_norms(model)
    left = {name: why for name, each in layers.items() if (why := _reason(model, each))}
    layers = {name: each for name, each in layers.items() if name not in left}
    if not layers:
        return model, RecalibrationReport({}, left, {}, 0, False)
    found = estimate(model, batches, layers, **options)
    weights = {
        name: 1.0 if weight is None else _weight_of(weight, each.samples)
        for name, each in found.layers.items()
    }
    new = {
        name: _statistics(name, layers[name], each, weights[name], blend=weight is not None)
        for name, each in found.layers.items()
    }
    before = {name: _drift(layers[name], each) for name, each in found.layers.items()}
    after: dict[str, Drift] = {}
    if found.again and new:
        with buffers_kept(model):
            _write(layers, new)
            some = islice(batches, found.batches_here)
            options = {key: options[key] for key in ("forward", "device", "process_group")}
            seen = estimate(model, some, layers, by_batch=False, **options).layers
            after = {name: _drift(layers[name], each) for name, each in seen.items() if name in new}
    _write(layers, new)
    left |= {
        name: "no batch was finite" if name in found.skipped else "it was not called"
        for name in layers
        if name not in new
    }
    done = {
        name: Recalibrated(
            each.batches, each.samples, each.count, weights[name], before[name], after.get(name)
        )
        for name, each in found.layers.items()
    }
    return model, RecalibrationReport(done, left, found.skipped, found.batches, found.settled)


def _reason(model: nn.Module, layer: _BatchNorm) -> str:
    """Return why a layer is left as it is; nothing if it is not."""
    if layer.running_mean is None or layer.running_var is None:
        return "it has no running statistics"
    if is_frozen(layer):
        return "it is frozen"
    if model.training and not layer.training:
        return "it is in eval mode while the model is in training mode"
    return ""


def _weight_of(weight: float | Callable[[int], float], samples: int) -> float:
    value = weight(samples) if callable(weight) else weight
    if not 0 <= value <= 1:
        when = f" for {samples} samples" if callable(weight) else ""
        raise InputError(f"expected a weight from 0 to 1, got {value}{when}")
    return float(value)


def _statistics(
    name: str, layer: _BatchNorm, found: Estimate, weight: float, blend: bool
) -> dict[str, Tensor]:
    """Return the new values of a layer's buffers."""
    where = name or "the model"
    if found.count < 2:
        raise InputError(
            f"{where}: got a single value per channel in all, whose variance says nothing: give "
            "more samples"
        )
    values = {}
    for key, value in (("running_mean", found.mean), ("running_var", found.unbiased_var)):
        old = getattr(layer, key)
        if blend:
            value = (1 - weight) * old.detach().cpu().double() + weight * value
        values[key] = value.to(old.dtype)
        if not values[key].isfinite().all():
            if blend and not old.isfinite().all():
                raise InputError(f"{where}: {key} is not finite, so recalibrate it instead")
            raise InputError(
                f"{where}: {key} reaches {value.abs().max():.3g}, beyond {old.dtype}: keep the "
                "layer's buffers in float32"
            )
    if not blend and layer.num_batches_tracked is not None:
        values["num_batches_tracked"] = torch.tensor(found.batches)
    return values


@torch.no_grad()
def _write(layers: Mapping[str, _BatchNorm], values: _Statistics) -> None:
    for name, each in values.items():
        for key, value in each.items():
            getattr(layers[name], key).copy_(value)


def _drift(layer: Any, found: Estimate) -> Drift:
    mean, var = (getattr(layer, key).detach().cpu().double() for key in _RUNNING)
    z = (mean - found.mean).abs() / (found.unbiased_var + layer.eps).sqrt()
    v = ((var + layer.eps) / (found.unbiased_var + layer.eps)).log().abs()
    return Drift(z.quantile(0.95).item(), z.max().item(), v.max().item())


_RUNNING = ("running_mean", "running_var")
