"""Batch norm layers that stay as they are while the rest of a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normlab.errors import InputError, did_you_mean
from normlab.surgery.models import batch_norms, copy_of

__all__ = ["FreezeReport", "freeze", "is_frozen", "unfreeze"]

_PARTS = {
    "statistics": ("statistics",),
    "parameters": ("parameters",),
    "all": ("statistics", "parameters"),
}


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` or `unfreeze` did. Keys are qualified names, "" for the model itself.

    Attributes:
        action: "frozen" or "unfrozen".
        changed: Of a layer, what is now so: "statistics", and the names of parameters.
        left: Why something of a layer was left as it was.
    """

    action: str
    changed: dict[str, list[str]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{len(self.changed)} batch norm layers {self.action}; "
            f"{len(self.left)} left as they were, or in part"
        ]
        lines += [f"  {name or 'the model'}: {', '.join(w)}" for name, w in self.changed.items()]
        lines += [f"  {name or 'the model'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    def _note(self, name: str, outcome: list[str] | str) -> None:
        if isinstance(outcome, list):
            self.changed.setdefault(name, []).extend(outcome)
        else:
            self.left[name] = "; ".join(filter(None, [self.left.get(name), outcome]))


def freeze(
    model: nn.Module, which: str = "all", *, inplace: bool = False
) -> tuple[nn.Module, FreezeReport]:
    """Freeze the batch norm layers of a model, of whatever class.

    A layer with frozen statistics normalizes by its running statistics and never moves them,
    whatever `train()` is told. Frozen parameters do not require gradients. Both survive copies and
    pickles; state dicts are as before, and loading one changes the values and thaws nothing. What
    is frozen already stays so.

    A `train` of the layer's own holds it there, an attribute of the object: assigning
    `layer.training = True` goes around it. An optimizer moves a parameter that still has a `grad`,
    so freeze after `zero_grad()`; and freeze before wrapping a model for data-parallel training or
    making others of its layers, as `convert_sync_batchnorm` does.

    Args:
        model: The user's.
        which: "statistics", "parameters" (γ and β) or "all".
        inplace: Change the model itself and not a copy.

    Returns:
        The model, and what was frozen. Layers without running statistics are named there.

    Raises:
        InputError: `which` is unknown, or `model` is not a module.

    >>> model, report = freeze(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    >>> print(report)
    1 batch norm layers frozen; 0 left as they were, or in part
      1: statistics, weight, bias
    >>> model.train()[1].training
    False
    """
    model, layers, parts = _begin(model, which, inplace)
    # Of all before the first is changed: layers may share a parameter.
    required = {each: each.requires_grad for layer in layers.values() for each in _own(layer)}
    report = FreezeReport("frozen", {}, {})
    for name, layer in layers.items():
        if "statistics" in parts:
            report._note(name, _freeze_statistics(layer))
        if "parameters" in parts:
            report._note(name, _freeze_parameters(layer, required))
    return model, report


def unfreeze(
    model: nn.Module, which: str = "all", *, inplace: bool = False
) -> tuple[nn.Module, FreezeReport]:
    """Undo `freeze` without loss.

    A layer takes the mode that it would have, had it never been frozen: calls of `train` and `eval`
    in between count. A parameter requires gradients if it did before.

    Args:
        model: The user's.
        which: "statistics", "parameters" or "all"; the other stays frozen.
        inplace: Change the model itself and not a copy.

    Returns:
        The model, and what was unfrozen.

    Raises:
        InputError: `which` is unknown, or `model` is not a module.

    >>> model, _ = freeze(nn.Sequential(nn.BatchNorm1d(3)))
    >>> print(unfreeze(model)[1])
    1 batch norm layers unfrozen; 0 left as they were, or in part
      0: statistics, weight, bias
    """
    model, layers, parts = _begin(model, which, inplace)
    report = FreezeReport("unfrozen", {}, {})
    for name, layer in layers.items():
        if "statistics" in parts:
            report._note(name, _unfreeze_statistics(layer))
        if "parameters" in parts:
            report._note(name, _unfreeze_parameters(layer))
    return model, report


def is_frozen(layer: nn.Module) -> bool:
    """Tell whether the statistics of a layer are frozen.

    >>> layer = nn.BatchNorm1d(3)
    >>> is_frozen(layer), is_frozen(freeze(layer)[0])
    (False, True)
    """
    return isinstance(vars(layer).get("train"), _Stay)


class _Stay:
    """The `train` of a frozen layer.

    On the object and not in a class of its own, so that the layer is of the class it was, which
    others ask for; with the layer in an attribute, so that it is copied and pickled with it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mode = layer.training  # That the layer would have.
        self.own: Callable[[bool], Any] | None = vars(layer).get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        layer = self.layer
        layer.training = self.mode
        try:
            # What a class does there of its own, and modules inside a layer, are not frozen.
            if self.own is None:
                type(layer).train(layer, mode)
            else:
                self.own(mode)
            self.mode = layer.training
        finally:
            layer.training = False
        return layer


def _begin(
    model: nn.Module, which: str, inplace: bool
) -> tuple[nn.Module, dict[str, _BatchNorm], tuple[str, ...]]:
    if which not in _PARTS:
        known = ", ".join(map(repr, _PARTS))
        raise InputError(f"unknown part {which!r}: known are {known}{did_you_mean(which, _PARTS)}")
    model = copy_of(model, inplace=inplace)
    return model, batch_norms(model), _PARTS[which]


def _freeze_statistics(layer: _BatchNorm) -> list[str] | str:
    if is_frozen(layer):
        return "its statistics are frozen already"
    if layer.running_mean is None:
        return "it has no running statistics"
    if is_lazy(layer.running_mean):
        return "it has no running statistics before its first batch"
    vars(layer)["train"] = _Stay(layer)
    layer.training = False
    return ["statistics"]


def _unfreeze_statistics(layer: _BatchNorm) -> list[str] | str:
    stay = vars(layer).get("train")
    if not isinstance(stay, _Stay):
        return "its statistics are not frozen"
    del vars(layer)["train"]
    if stay.own is not None:
        vars(layer)["train"] = stay.own
    layer.training = stay.mode
    return ["statistics"]


_RECORD = "_required_grad"


def _own(layer: nn.Module) -> Iterator[nn.Parameter]:
    return layer.parameters(recurse=False)


def _freeze_parameters(layer: _BatchNorm, required: dict[nn.Parameter, bool]) -> list[str] | str:
    if _RECORD in vars(layer):
        return "its parameters are frozen already"
    parameters = dict(layer.named_parameters(recurse=False))
    if not parameters:
        return "it has no parameters"
    if any(map(is_lazy, parameters.values())):
        return "it has no parameters before its first batch"
    vars(layer)[_RECORD] = {name: required[each] for name, each in parameters.items()}
    for each in parameters.values():
        each.requires_grad_(False)
    return list(parameters)


def _unfreeze_parameters(layer: _BatchNorm) -> list[str] | str:
    if _RECORD not in vars(layer):
        return "its parameters are not frozen"
    required = vars(layer).pop(_RECORD)
    parameters = dict(layer.named_parameters(recurse=False))
    for name in required.keys() & parameters.keys():
        parameters[name].requires_grad_(required[name])
    return [name for name in parameters if name in required]
