"""A model's batch norm layers, replaced by normlab's, which also do what follows them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from normlab import layers
from normlab.errors import InputError, did_you_mean
from normlab.surgery import fusion
from normlab.surgery.models import copy_of

__all__ = ["Report", "convert", "convert_with_report"]

_TARGETS = ("batch",)
_CLASSES: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
    nn.SyncBatchNorm: layers.SyncBatchNorm,
}
# What a subclass may define and still be the layer that its base is.
_HARMLESS = {"__init__", "__repr__", "extra_repr"} | set(vars(type("_", (), {})))
_HARMLESS |= {"__annotations__", "__annotate_func__", "__firstlineno__", "__static_attributes__"}
_OPTIONS = (
    inspect.signature(layers.BatchNorm1d).parameters.keys()
    - inspect.signature(nn.BatchNorm1d).parameters.keys()
)


@dataclass(frozen=True)
class Report:
    """What a conversion did. Keys are qualified names of modules, "" for the model itself.

    Attributes:
        replaced: What took a layer's place, and what it does: "BatchNorm2d + add + relu".
        unfused: Why a replaced layer does not do what follows it; empty with `fuse=False`.
        skipped: Why a batch norm layer was left as it was.
        rewritten: Modules whose forward pass is now the code of a graph, with their class.
    """

    replaced: dict[str, str]
    unfused: dict[str, str]
    skipped: dict[str, str]
    rewritten: dict[str, str]

    def __str__(self) -> str:
        fused = sum("+" in what for what in self.replaced.values())
        lines = [
            f"{len(self.replaced)} batch norm layers replaced, {fused} with what follows them; "
            f"{len(self.skipped)} left as they were; {len(self.rewritten)} forward passes rewritten"
        ]
        for name, what in self.replaced.items():
            reason = f" ({self.unfused[name]})" if name in self.unfused else ""
            lines.append(f"  {name or 'the model'}: {what}{reason}")
        lines += [f"  {name or 'the model'}: left, {why}" for name, why in self.skipped.items()]
        lines += [
            f"  {name or 'the model'}: forward pass of {cls} rewritten"
            for name, cls in self.rewritten.items()
        ]
        return "\n".join(lines)


def convert(model: nn.Module, to: str = "batch", *, fuse: bool = True) -> nn.Module:
    """Return a copy of a model with normlab's batch norm layers in the place of torch's.

    Weights, buffers, hooks, modes, shared modules and parameters, and the state dict are kept. With
    `fuse`, a layer also does the activation, or the addition and ReLU, that follows it, if nothing
    else reads the value between and neither has hooks there; what is read is seen from order in an
    `nn.Sequential` and from a graph of the forward pass elsewhere. A forward pass that a graph
    cannot tell stays as it is. Custom modules are taken to be called as a whole.

    Args:
        model: Left as it is.
        to: "batch", batch normalization by normlab's own layers.
        fuse: Let layers do what follows them.

    Returns:
        The copy. A module whose forward pass was rewritten is of a subclass of the class it had.

    Raises:
        InputError: `to` is unknown, or `model` is not a module.

    >>> convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()))[1].activation
    'relu'
    """
    return convert_with_report(model, to, fuse=fuse)[0]


def convert_with_report(
    model: nn.Module, to: str = "batch", *, fuse: bool = True
) -> tuple[nn.Module, Report]:
    """Return what `convert` returns, and a report of what was done and what not, and why.

    >>> print(convert_with_report(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))[1])
    1 batch norm layers replaced, 1 with what follows them; 0 left as they were; 0 forward passes \
rewritten
      0: BatchNorm1d + relu
    """
    if to not in _TARGETS:
        known = ", ".join(map(repr, _TARGETS))
        raise InputError(f"unknown target {to!r}: known are {known}{did_you_mean(to, _TARGETS)}")
    copied = copy_of(model)
    names = {module: name for name, module in copied.named_modules()}
    found: dict[nn.Module, Any] = {}
    skipped = {}
    for module, name in names.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if isinstance(module, tuple(_CLASSES.values())):
                continue
            try:
                found[module] = _replacement(module)
            except _SkippedError as error:
                skipped[name] = str(error)
    follows, reasons, rewritten = fusion.fuse(copied, found) if fuse else ({}, {}, {})
    replaced = {}
    for layer, cls in found.items():
        name, follow = names[layer], follows.get(layer)
        was = f" (was {type(layer).__name__})" if type(layer) not in _CLASSES else ""
        replaced[name] = cls.__name__ + _what(follow) + was
        layer.__class__ = cls  # In place, so that all who hold the layer hold the new one.
        options = {} if follow is None else follow._asdict()
        options.pop("added", None)
        layer._set_options(**options)  # type: ignore[operator]
        vars(layer).setdefault("name", name)
    unfused = {names[layer]: why for layer, why in reasons.items() if layer not in follows}
    passes = {names[module]: cls for module, cls in rewritten.items()}
    return copied, Report(replaced, unfused, skipped, passes)


class _SkippedError(Exception):
    """A layer is not replaced, for this reason."""


def _replacement(layer: nn.Module) -> Any:
    """Return the class of normlab's that does all that a layer's class does."""
    if "forward" in vars(layer):
        raise _SkippedError("its forward was set on the object")
    taken = sorted(_OPTIONS & vars(layer).keys())
    if taken:
        raise _SkippedError(f"it has an attribute {taken[0]!r}, which normlab's layers use")
    cls = type(layer)
    for each in cls.__mro__:
        if each in _CLASSES:
            return _CLASSES[each]
        own = sorted(vars(each).keys() - _HARMLESS)
        if own:
            raise _SkippedError(f"its class {each.__name__} has {own[0]} of its own")
    raise _SkippedError(f"its class {cls.__name__} is not one of torch's batch norms")


def _what(follow: fusion.Follow | None) -> str:
    if follow is None:
        return ""
    return f"{' + add' if follow.added else ''} + {follow.activation}"
