"""A model's norm layers, made those of another kind; normlab's also do what follows them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normlab import layers
from normlab.errors import InputError
from normlab.layers import NORM_LAYERS
from normlab.streams import generators_kept
from normlab.surgery import fusion
from normlab.surgery.calibration import calibrate_layers, relative_error
from normlab.surgery.kinds import (
    OPTIONS,
    TO_OURS,
    TO_TORCH,
    Call,
    Kind,
    calls_noted,
    check_shape,
    equivalent,
    is_ours,
    kinds_of,
    parse,
    spatial_dimensions,
    with_what_follows,
)
from normlab.surgery.memory import Memory, become, memories, undo
from normlab.surgery.models import Forward, copy_of, put_back_on_failure, run_on
from normlab.surgery.report import ConversionReport
from normlab.surgery.standins import STANDIN_FOR, STANDINS, Follows
from normlab.surgery.unfusing import unfuse

__all__ = ["convert"]

_CLASSES = {
    *TO_OURS,
    *TO_TORCH,
    *STANDINS,
    *STANDINS.values(),
    nn.RMSNorm,
}
# What a subclass may define and still be the layer that its base is.
_HARMLESS = {"__init__", "__repr__", "extra_repr"} | set(vars(type("_", (), {})))
_HARMLESS |= {"__annotations__", "__annotate_func__", "__firstlineno__", "__static_attributes__"}
_TENSORS = (
    *("weight", "bias", "running_mean", "running_var"),
    *("num_batches_tracked", "num_batches_skipped"),
)


def convert(
    model: nn.Module,
    to: str = "batch",
    *,
    fuse: bool = True,
    example: Any = None,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Make a model's norm layers those of another kind.

    γ and β are kept where both kinds have them per channel, hooks, modes and shared modules always,
    and so are the names in the state dict of all that is kept. What the new kind has no room for
    stays on the layer, outside of the state dict and of any optimizer, until the layer becomes
    again what it was. A kind that scales and shifts does so also where the old layer did not.

    With `fuse`, normlab's own batch norms ("batch", "sync", "ghost:N") also do the activation, or
    the addition and ReLU, that follows, if nothing else reads the value between and neither has
    hooks there; what is read is seen from order in an `nn.Sequential` and from a graph of the
    forward pass elsewhere. A forward pass that a graph cannot tell stays as it is. Custom modules
    are taken to be called as a whole. On the way to another kind the modules that did so before do
    it again; an activation that a layer was built with stays in the layer.

    Args:
        model: Left as it is, unless `inplace`.
        to: "batch", normlab's batch norm; "torch-batch", torch's; "sync", normlab's over a process
            group; "ghost:32", normlab's by parts of 32 samples; "group:8"; "layer", over all of
            (C, …); "instance"; "rms"; or "none", an identity, or with `calibrate` a scale and shift
            per channel.
        fuse: Let layers do what follows them.
        example: An input, as a loader yields it: a tensor, a tuple or list whose first is the
            input, or a mapping of keywords. Needed where the shape that a layer gets decides what
            takes its place, and to make batch norms of layers that never were any: without it these
            are left as they are.
        calibrate: Batches to fit γ and β to, so that the model does what it did as nearly as may
            be: layer by layer in order of their calls, each by least squares of what the old layer
            put out in the old model, on what the new one normalizes in the new model. A batch norm
            in the place of another kind also gets the running statistics of the batches. Between
            batch norms there is nothing to fit. All are kept in memory, and the model runs on them
            twice for every layer.
        forward: Runs the model on any other batch, or in another way.
        device: What tensors in batches are moved to.
        inplace: Convert the model itself, which is as it was if that fails.

    Returns:
        The converted model, and a report. A module whose forward pass was rewritten is of a
        subclass of the class it had.

    Raises:
        InputError: `to` is unknown, `model` is no module, a batch is of a kind that it does not
            know, an example is needed and missing, or a layer has no equivalent, which it names.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> converted, report = convert(model)
    >>> converted[1].activation
    'relu'
    >>> grouped, report = convert(converted, "group:2")
    >>> print(report)
    1 norm layers replaced; 0 left as they were
      1: GroupNorm (was BatchNorm2d) (kept for the way back: running_mean, running_var, \
num_batches_tracked)
      2: ReLU again
    """
    batches = _batches(calibrate)
    kind = parse(to, calibrated=bool(batches))
    run = _Run(forward, device)
    samples = batches or ([] if example is None else [example])
    converted = copy_of(model, inplace=inplace)
    with put_back_on_failure(converted), generators_kept():
        return converted, _Conversion(converted, kind, run, samples).do(bool(batches), fuse)


class _SkippedError(Exception):
    """A layer is not replaced, for this reason."""


@dataclass(frozen=True)
class _Run:
    forward: Forward | None
    device: torch.device | str | None

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return run_on(model, batch, self.forward, self.device)


class _Conversion:
    """One model on its way."""

    def __init__(self, model: nn.Module, kind: Kind, run: _Run, samples: list[Any]) -> None:
        self.model, self.kind, self.run, self.samples = model, kind, run, samples
        self.names = {module: name for name, module in model.named_modules()}
        self.report = ConversionReport(kind.name, {})

    def do(self, calibrate: bool, fuse: bool) -> ConversionReport:
        model, report, names = self.model, self.report, self.names
        restored = {} if self.kind.follows else unfuse(model)
        report.restored.update({names[each]: cls for each, cls in restored.items()})
        found = self._found()
        old = copy_of(model) if self.samples else None
        calls: dict[str, list[Call]] | None = None
        if old is not None:
            with calls_noted(old, [names[layer] for layer in found]) as calls:
                self.run(old, self.samples[0])
        changed = {}
        for layer in found:
            name, was = names[layer], type(layer)
            try:
                refits = self._convert(layer, None if calls is None else calls[name], calibrate)
            except _SkippedError as error:
                report.skipped[name] = str(error)
                continue
            changed[layer] = (was, refits)
        change = uncalibrated = None
        if old is not None:
            fits = [names[layer] for layer, (_, refits) in changed.items() if refits]
            change = relative_error(old, model, self.run, self.samples)
            if calibrate:
                uncalibrated = change
                explained = calibrate_layers(old, model, fits, self.run, self.samples)
                report.explained.update(explained)
                change = relative_error(old, model, self.run, self.samples)
        follows = self._fuse(changed) if fuse else {}
        for layer, (was, _) in changed.items():
            now = _name(type(layer))
            what = now + _what(layer, follows.get(layer))
            report.replaced[names[layer]] = what + f" (was {_name(was)})" * (_name(was) != now)
        return replace(report, error=change, uncalibrated=uncalibrated)

    def _found(self) -> list[Any]:
        """Return the layers to convert, and note which other norms are left."""
        found = []
        for module, name in self.names.items():
            if not isinstance(module, NORM_LAYERS) and not memories(module):
                continue
            if self.kind.name in kinds_of(module) and not self._steps_back(module):
                continue
            try:
                self._check(module)
                found.append(module)
            except _SkippedError as error:
                self.report.skipped[name] = str(error)
        return found

    def _check(self, layer: nn.Module) -> None:
        """Refuse what may be more than a norm layer, or is one of which too little is known."""
        if "forward" in vars(layer):
            raise _SkippedError("its forward was set on the object")
        if isinstance(layer, tuple(TO_OURS)) and not isinstance(layer, (*TO_TORCH, Follows)):
            taken = sorted(vars(layer).keys() & {*OPTIONS})
            if taken and self.kind.follows:
                raise _SkippedError(f"it has an attribute {taken[0]!r}, which normlab's layers use")
        cls = _base(layer)
        if not (self.kind.is_batch and issubclass(cls, _BatchNorm)):
            own = [*layer._parameters, *layer._buffers, *layer._modules]
            own = [each for each in own if each not in _TENSORS]
            if own:
                raise _SkippedError(f"it has {own[0]} of its own")
        lazy = any(map(is_lazy, (*layer.parameters(), *layer.buffers())))
        if lazy and (not self.kind.is_batch or self.kind.name == "sync"):
            raise _SkippedError("it has not seen a batch yet, and so knows no channels")
        before = [each.cls for each in memories(layer)]
        never = not any(issubclass(each, _BatchNorm) for each in (cls, *before))
        if self.kind.is_batch and never and not self.samples:
            raise _SkippedError(
                f"{cls.__name__} becomes a batch norm only with example=, an input of the network"
            )

    def _steps_back(self, layer: nn.Module) -> int:
        """Return how many conversions ago a layer was what is asked for; 0 if it never was."""
        before = enumerate(memories(layer), 1)
        return next((step for step, each in before if self.kind.name in each.kinds), 0)

    def _detour(self, layer: nn.Module) -> int:
        """Return how many conversions to take back before going on to what a layer never was."""
        before = [each.cls for each in memories(layer)]
        if self.kind.is_batch and not isinstance(layer, _BatchNorm):
            # A batch norm has its running statistics from the last one before.
            return next((i for i, each in enumerate(before, 1) if issubclass(each, _BatchNorm)), 0)
        # An identity does not know its channels, nor a synchronized layer its dimensions; what
        # they were does.
        return int(bool(before) and isinstance(layer, (nn.Identity, layers.SyncBatchNorm)))

    def _convert(self, layer: Any, calls: list[Call] | None, calibrate: bool) -> bool:
        """Convert a layer in place, and tell whether it normalizes in another way now."""
        name, was_batch = self.names[layer], isinstance(layer, _BatchNorm)
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and calls and self.kind.name != "none":
            try:
                check_shape(name, layer, calls[0].shape)
            except InputError as error:
                raise _SkippedError(str(error).partition(": ")[2]) from None
        returned: set[str] = set()
        steps = self._steps_back(layer)
        for _ in range(steps or self._detour(layer)):
            returned.update(undo(layer))
        if not steps:
            self._go_on(layer, calls, calibrate)
        alike = was_batch and isinstance(layer, _BatchNorm)
        tensors = {**layer._parameters, **layer._buffers}
        came = [each for each, value in tensors.items() if value is not None and each in returned]
        if calibrate and not alike:
            came = []
        if came:
            self.report.returned[name] = ", ".join(came)
        if not steps and memories(layer):
            kept = _kept(memories(layer)[0])
            self.report.kept.update({name: ", ".join(kept)} if kept else {})
        return not alike

    def _go_on(self, layer: Any, calls: list[Call] | None, calibrate: bool) -> None:
        """Make a layer what it never was."""
        kind, name = self.kind, self.names[layer]
        base, kinds = _base(layer), kinds_of(layer)
        synchronized = issubclass(base, (layers.SyncBatchNorm, nn.SyncBatchNorm))
        if (
            issubclass(base, _BatchNorm)
            and kind.is_batch
            and not (synchronized and kind.ghost_size)
        ):
            if kind.name == "sync":
                cls: Any = layers.SyncBatchNorm
            elif kind.name == "torch-batch":
                cls = TO_TORCH[base]
            else:
                cls = TO_OURS.get(base, base)
            new, living = _other_batch_norm(name, layer, cls, kind.ghost_size, calls)
            become(layer, new, living, kinds)
            return
        if not calls and spatial_dimensions(layer) is not None:
            calls = None  # Not called by the example, and known without it.
        new, found = equivalent(name or "the model", layer, kind.construct, calls)
        if calibrate:
            found = [each for each in found if each not in ("weight", "bias")]
        become(layer, new, found, kinds)

    def _fuse(self, changed: Iterable[nn.Module]) -> dict[nn.Module, fusion.Follow]:
        """Let layers do what follows them."""
        able: list[Any] = [each for each in changed if is_ours(each)]
        follows, reasons, rewritten = fusion.fuse(
            self.model, [each for each in able if each.activation is None]
        )
        for layer, follow in follows.items():
            vars(layer)["activation"] = follow.activation
            vars(layer)["negative_slope"] = follow.negative_slope
        names = self.names
        self.report.unfused.update(
            {names[layer]: why for layer, why in reasons.items() if layer not in follows}
        )
        self.report.rewritten.update({names[each]: cls for each, cls in rewritten.items()})
        return follows


def _base(layer: nn.Module) -> type[nn.Module]:
    """Return the known class all of whose doing a layer's class does, and nothing else."""
    cls = type(layer)
    for each in cls.__mro__:
        if each in _CLASSES:
            return STANDIN_FOR.get(each, each)
        own = sorted(vars(each).keys() - _HARMLESS)
        if own:
            raise _SkippedError(f"its class {each.__name__} has {own[0]} of its own")
    raise _SkippedError(f"its class {cls.__name__} is not one of the norms known here")


def _name(cls: type[nn.Module]) -> str:
    return STANDIN_FOR.get(cls, cls).__name__


def _other_batch_norm(
    name: str, layer: Any, cls: Any, ghost_size: int | None, calls: list[Call] | None
) -> tuple[nn.Module, set[str]]:
    """Return a batch norm layer of another class with the tensors of one, and what it has of it."""
    new = cls.__new__(cls)
    vars(new).update({key: copy.copy(value) for key, value in vars(layer).items() if key[0] == "_"})
    vars(new).update({key: value for key, value in vars(layer).items() if key[0] != "_"})
    mine = {"ghost_size"}
    if cls in TO_TORCH:
        given = {each: vars(layer)[each] for each in OPTIONS if each in vars(layer)}
        if is_ours(layer):
            vars(new)["ghost_size"] = ghost_size
        else:
            new._set_options(**given | {"ghost_size": ghost_size})
        vars(new).setdefault("name", name)
    else:
        mine |= {*OPTIONS, "name", "num_batches_skipped"}
        for each in mine:
            vars(new).pop(each, None)
        new._buffers.pop("num_batches_skipped", None)
        new = with_what_follows(name, layer, new, calls or [])
    names = {*vars(layer), *layer._parameters, *layer._buffers}
    return new, names - mine


def _kept(memory: Memory) -> list[str]:
    """Return the names of what a layer had that it has no room for now."""
    found = memory.attributes
    tensors = {**found["_parameters"], **found["_buffers"]}
    kept = [name for name, value in tensors.items() if value is not None]
    defaults = vars(layers.BatchNorm1d(1))
    options = [name for name in OPTIONS if found.get(name, defaults[name]) != defaults[name]]
    return kept + [name for name in sorted(options) if name not in ("activation", "negative_slope")]


def _what(layer: Any, follow: fusion.Follow | None) -> str:
    activation = getattr(layer, "activation", None)
    added = " + add" if follow is not None and follow.added else ""
    return "" if activation is None else f"{added} + {activation}"


def _batches(calibrate: Iterable[Any] | None) -> list[Any]:
    if calibrate is None:
        return []
    if isinstance(calibrate, (Tensor, Mapping, str)) or not isinstance(calibrate, Iterable):
        raise InputError(
            f"calibrate is a {type(calibrate).__name__}: expected batches, as in calibrate=[batch]"
        )
    batches = list(calibrate)
    if not batches:
        raise InputError("calibrate has no batches: expected at least one to fit to")
    return batches
