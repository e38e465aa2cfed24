"""Batch norms folded into the layers beside them, for evaluation, with the error measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from normlab.errors import InputError
from normlab.surgery.certificate import Certificate, compare, floats_of, run_example
from normlab.surgery.changes import Changes, Into
from normlab.surgery.lifting import lift
from normlab.surgery.models import copy_of
from normlab.surgery.planning import FUNCTIONAL, called_in, changes_of

__all__ = ["FoldReport", "fold"]


@dataclass(frozen=True)
class FoldReport:
    """What folding did. Names are qualified names of modules, "" for the model itself.

    Attributes:
        folded: For each batch norm that is gone, the layer that does it now, and whether that layer
            comes before or after it.
        left: Why a batch norm was left as it was; functional ones are named "F.batch_norm in" the
            module that calls them.
        removed: Keys of the state dict that are gone.
        added: Keys of the state dict that are new: biases of layers that had none.
        certificate: The measured error; None if nothing was folded.
        training: Whether the model was in training mode. Folded batch norms compute no statistics
            there any more.
    """

    folded: dict[str, Into]
    left: dict[str, str]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    certificate: Certificate | None
    training: bool

    def __str__(self) -> str:
        if not self.folded and not self.left:
            return "the model has no batch norms: nothing to fold"
        lines = [f"{len(self.folded)} batch norms folded, {len(self.left)} left as they were"]
        if self.certificate is not None:
            lines.append(f"  {self.certificate}")
        if self.training and self.folded:
            lines.append(
                "  the model is in training mode, where what is folded computes no statistics"
            )
        lines += [
            f"  {name}: into {into.layer}, {into.side} it" for name, into in self.folded.items()
        ]
        lines += [f"  {name or 'the model'}: left, {why}" for name, why in self.left.items()]
        if self.removed:
            lines.append(
                f"  state dict: {len(self.removed)} keys gone (.removed), {len(self.added)} new "
                "(.added)"
            )
        return "\n".join(lines)


class _Lifts(NamedTuple):
    """Which functional batch norms become modules, and where they are called."""

    owners: list[str]
    norms: list[str]


class _Prepared(NamedTuple):
    lifts: _Lifts
    changes: Changes
    certificate: Certificate | None


def fold(
    model: nn.Module, example: Any, *, tolerance: float | None = None, inplace: bool = False
) -> tuple[nn.Module, FoldReport]:
    """Fold a model's batch norms into the convolutions and linear layers beside them.

    In evaluation a batch norm is `x·s + t` per channel, which the layer before it can do with
    weights `s·W` and bias `s·b + t`, and the layer after it with `W·s` and `b + Σ W·t` where it
    pads with no zeros. Who feeds whom is seen by running a copy of the model on the example: a
    batch norm is folded only if all that the layer returned went into it, in every call of both,
    and nothing else read or kept that value. What the model does on other inputs is taken to
    follow the same ways.

    `nn.Identity` takes a folded batch norm's place, or what it did besides: an activation, an
    addition, the parts of a subclass. Names, modes and all else stay; weights that change are new
    parameters. `F.batch_norm`, and the functional layer before it, become modules first, which own
    the tensors from then on, where a graph tells the forward pass that calls them. A model in
    training mode is measured in evaluation and returned in training mode. Its hooks run with it.

    Args:
        model: With convolutions (1d, 2d, 3d, transposed, grouped), linear layers and batch norms
            of torch, of normlab, or of a subclass that hands what it normalized on to its parts.
        example: What the model takes, on its device: a tensor, a tuple of positional arguments, or
            a mapping of keyword arguments.
        tolerance: The largest error allowed, relative to the largest absolute value of the
            original's output; by default 1e-9 for float64, 1e-4 for float32 and 2e-2 for bfloat16
            and float16, by the least precise among output and parameters.
        inplace: Fold in the model itself, after the error was measured on a copy.

    Returns:
        The folded copy, or the model itself, and a report with the measured error.

    Raises:
        InputError: The model cannot be copied or run on the example, returns no floating-point
            tensor, or is further from the original than is allowed. The model is as it was.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2, for the layer before.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> folded, report = fold(model, torch.rand(1, 3, 8, 8))
    >>> report.folded, report.left
    ({'1': Into(layer='0', side='before')}, {})
    >>> folded[1], report.certificate.relative_largest < 1e-6
    (Identity(), True)
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"expected a model of modules, got a {type(model).__name__}: fold before it is scripted"
        )
    with torch.inference_mode(False):
        return _folded(model, example, tolerance, inplace)


def _folded(
    model: nn.Module, example: Any, tolerance: float | None, inplace: bool
) -> tuple[nn.Module, FoldReport]:
    prepared = _prepare(model, example, tolerance)
    before, training = list(model.state_dict()), model.training
    result = model if inplace else _copied(model)
    lift(result, *prepared.lifts)
    prepared.changes.apply(result)
    now = list(result.state_dict())
    report = FoldReport(
        prepared.changes.folded,
        prepared.changes.left,
        tuple(key for key in before if key not in now),
        tuple(key for key in now if key not in before),
        prepared.certificate,
        training,
    )
    return result, report


def _prepare(model: nn.Module, example: Any, tolerance: float | None) -> _Prepared:
    """Find what to change in a model, and measure it on copies; the model stays as it is."""
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"expected a tolerance of 0 or more, got {tolerance!r}")
    lifts, refused, changes = _found(model, example)
    for name, why in refused.items():
        if changes.left.get(called_in(name)) == FUNCTIONAL:
            changes.left[called_in(name)] = f"{FUNCTIONAL}, and cannot become one: {why}"
    if not changes.folded:
        return _Prepared(lifts, changes, None)
    original = floats_of(run_example(_evaluated(model), example))
    measured = _evaluated(model)
    lift(measured, *lifts)
    changes.apply(measured)
    try:
        output = run_example(measured, example)
    except InputError as error:
        raise InputError(
            "the model runs on the example as it is, but folded it does not, so that its code must "
            f"look at what folding takes away ({error.__cause__!r}); not folded"
        ) from error
    certificate = compare(original, floats_of(output), tolerance, model)
    if not certificate.relative_largest <= certificate.tolerance:
        raise InputError(
            f"folding changes the model's output by more than is allowed ({certificate}); "
            f"{changes.extreme()}; pass a larger tolerance if that is good enough; not folded"
        )
    return _Prepared(lifts, changes, certificate)


def _found(model: nn.Module, example: Any) -> tuple[_Lifts, dict[str, str], Changes]:
    """Return which functional batch norms become modules, why others do not, and what changes."""
    owners, only, refused = list[str](), None, dict[str, str]()
    while True:
        plain = _copied(model)
        lifted = lift(plain, owners, only)
        refused = lifted.refused | refused
        watched = _evaluated(plain)
        changes = changes_of(plain, watched, partial(run_example, watched, example))
        if changes.functional and not owners:
            owners = changes.functional
            continue
        stay = changes.left.keys() & lifted.norms
        if not stay:
            return _Lifts(owners, lifted.norms), refused, changes
        # Those stay calls: once more without them.
        refused = {name.rpartition(".")[0]: changes.left[name] for name in stay} | refused
        only = [name for name in lifted.norms if name not in stay]


def _evaluated(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation; a model in evaluation has the modes that it shall have."""
    copied = _copied(model)
    return copied.eval() if copied.training else copied


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy_of(model)
    except InputError:
        raise
    except Exception as error:  # Any object in the model may refuse.
        raise InputError(
            f"{type(model).__name__} cannot be copied, and folding measures on a copy: "
            f"{type(error).__name__}: {error}; take out what cannot be copied (weight_norm: "
            "torch.nn.utils.remove_weight_norm)"
        ) from error
