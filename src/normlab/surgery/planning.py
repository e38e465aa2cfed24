"""Which batch norms of a model can be folded, and into which layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from normlab import layers
from normlab.surgery import affine
from normlab.surgery.affine import Affine, Layer, Weights
from normlab.surgery.changes import ACTIVATIONS, Activated, Changes, Into, Rest, identity
from normlab.surgery.tracing import names_read
from normlab.surgery.watching import Call, Place, Watch, is_hooked, place

__all__ = ["FUNCTIONAL", "called_in", "changes_of"]

FUNCTIONAL = "it is not a module"
"""Why a functional call stays."""

_LAYERS = (_ConvNd, nn.Linear)
# The last are what is seen under `torch.inference_mode`.
_CONVOLUTIONS = (
    *("convolution", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
_PLAIN_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_STOCK = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def called_in(name: str) -> str:
    """Return what the functional batch norms of a module are called in a report.

    >>> called_in("block")
    'F.batch_norm in block'
    """
    return f"F.batch_norm in {name or 'the model'}"


def changes_of(model: nn.Module, watched: nn.Module, run: Callable[[], Any]) -> Changes:
    """Return what folding changes in a model, by what a run of its copy shows.

    Args:
        model: Looked at only.
        watched: A copy in evaluation, which is spoilt.
        run: Runs the copy.
    """
    names = {module: name for name, module in watched.named_modules()}
    originals = dict(zip(watched.modules(), model.modules(), strict=True))
    watch = Watch(watched, [each for each in names if isinstance(each, (*_LAYERS, _BatchNorm))])
    watch.run(run)
    planner = _Planner(model, watch, names, originals)
    norms = [each for each in names if isinstance(each, _BatchNorm)]
    for norm in sorted(norms, key=planner.first_call):
        planner.plan(norm)
    changes = planner.finished()
    changes.functional += dict.fromkeys(watch.functional)
    for name in changes.functional:
        changes.left[called_in(name)] = FUNCTIONAL
    return changes


class _LeftError(Exception):
    """A batch norm stays as it is, for this reason."""


class _Planner:
    """Decides batch norm by batch norm, in the order of their calls.

    Modules are those of the watched copy, by which calls are known; what they are like is asked of
    the originals, in which nothing has run.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        names: dict[nn.Module, str],
        originals: dict[nn.Module, nn.Module],
    ) -> None:
        self.watch, self.names, self.originals = watch, names, originals
        self.evaluated = not model.training
        self.changes = Changes()
        self.weights: dict[nn.Module, Weights] = {}
        self.biased_by: dict[nn.Module, _BatchNorm] = {}
        self.gone: dict[nn.Module, nn.Module] = {}
        self.holders = _holders(model)
        self.order: dict[nn.Module, int] = {}
        for call in watch.log:
            self.order.setdefault(call.layer, len(self.order))

    def first_call(self, norm: nn.Module) -> int:
        return self.order.get(norm, len(self.order))

    def plan(self, norm: _BatchNorm) -> None:
        """Decide where a batch norm goes."""
        name = self.names[norm]
        try:
            original: Any = self.originals[norm]
            self._check_norm(norm, original)
            rest, more = self._rest(norm, original)
            scaled = affine.of_norm(original)
            if not scaled.shift.isfinite().all():  # Nor is it where the scale is not.
                raise _LeftError("its scale or shift is not finite")
            try:
                layer, weights = self._before(norm, scaled)
                side = "before"
                if not more:
                    self.gone[norm] = layer
            except _LeftError as error:
                if more:
                    raise _LeftError(
                        f"{error}; it does more than the layer after it could"
                    ) from None
                try:
                    layer, weights = self._after(norm, scaled)
                except _LeftError as other:
                    raise _LeftError(f"{error}; {other}") from None
                side = "after"
        except _LeftError as error:
            self.changes.left[name] = str(error)
            return
        self.weights[layer] = weights
        self.biased_by.setdefault(layer, original)
        self.changes.folded[name] = Into(self.names[layer], side)
        self.changes.rests[name] = rest
        largest, least = float(scaled.scale.abs().max()), float(original.running_var.min())
        self.changes.scales[name] = (largest, least)

    def finished(self) -> Changes:
        """Return the changes, with weights in the dtype and on the device of each layer."""
        for module, weights in self.weights.items():
            layer: Any = self.originals[module]
            was = layer.weight
            weight, bias = (each.to(was.device, was.dtype) for each in weights)
            if layer.bias is not None:
                grad = layer.bias.requires_grad
            else:
                source = self.biased_by[module].bias
                grad = (was if source is None else source).requires_grad
            self.changes.weights[self.names[module]] = (
                nn.Parameter(weight, was.requires_grad),
                nn.Parameter(bias, grad),
            )
        return self.changes

    def _check_norm(self, norm: _BatchNorm, original: _BatchNorm) -> None:
        """Refuse a batch norm that is not `x·s + t` of its own tensors, or that somebody sees."""
        if any(map(is_lazy, original.buffers(False))):
            raise _LeftError("it is not initialized: run a batch through the model first")
        if original.training and self.evaluated:
            raise _LeftError("it is in training mode by choice, and normalizes by the batch")
        if original.running_mean is None:
            raise _LeftError("it has no running statistics, and normalizes by the batch")
        self._check_module(norm, original, "it")
        calls = self.watch.calls[norm]
        if not calls:
            raise _LeftError("it is not called on the example")
        for call in calls:
            if call.others.keys() - {"1", "residual"}:
                raise _LeftError("it is called with something else than a tensor and a residual")

    def _check_module(self, module: nn.Module, original: nn.Module, what: str) -> None:
        """Refuse what does not compute with plain tensors of its own, unseen by others."""
        if "forward" in vars(original):
            raise _LeftError(f"the forward of {what} was set on the object")
        tensors: Any = {"weight": original.weight, "bias": original.bias}
        for key, tensor in tensors.items():
            if tensor is not None and type(original._parameters.get(key)) is not nn.Parameter:
                raise _LeftError(f"the {key} of {what} is computed from something else")
        if is_hooked(original):
            raise _LeftError(f"{what} has hooks, which would see other values")
        outsiders = self.watch.outsiders[module]
        if outsiders:
            raise _LeftError(f"the tensors of {what} are also read elsewhere, by {outsiders[0]}")

    def _rest(self, norm: _BatchNorm, original: _BatchNorm) -> tuple[Rest, bool]:
        """Return what of a batch norm stays when `x·s + t` is gone, and if it does anything."""
        forward = type(original).forward
        if forward in _PLAIN_NORMS:
            return identity, False
        if forward is layers.BatchNorm2d.forward:
            activation: Any = original
            make = ACTIVATIONS[activation.activation]
            if any(call.others for call in self.watch.calls[norm]):
                return lambda norm: Activated(make(norm)).train(norm.training), True
            return make, make is not identity
        names = [self._parts(norm, call) for call in self.watch.calls[norm]]
        if any(each != names[0] for each in names):
            raise _LeftError(f"the forward of its class {type(original).__name__} varies")
        more = any(type(original._modules[name]) is not nn.Identity for name in names[0])
        return lambda norm: nn.Sequential(
            OrderedDict((n, norm._modules[n]) for n in names[0])
        ), more

    def _parts(self, norm: _BatchNorm, call: Call) -> list[str]:
        """Return the children to which a forward of its own hands on what it normalized."""
        where = call.steps[0].makes if call.steps else None
        state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        used = {place(each) for each in state if each is not None}
        if (
            len(call.steps) == 1
            and "batch_norm" in call.steps[0].name
            and call.steps[0].reads[0] == call.input
            and used == set(call.steps[0].reads[1:])
            and not call.others
        ):
            for _, taken, made in call.parts:
                if taken != where:
                    break
                where = made
            else:
                if where == call.output:
                    return [name for name, _, _ in call.parts]
        raise _LeftError(
            f"the forward of its class {type(norm).__name__} does more than normalize and hand on "
            "to its parts"
        )

    def _before(self, norm: _BatchNorm, scaled: Affine) -> tuple[nn.Module, Weights]:
        """Return the layer that makes a batch norm's input, and its weights with the batch norm."""
        makers = {call.maker and call.maker.layer for call in self.watch.calls[norm]}
        if len(makers) > 1:
            raise _LeftError("its inputs come from several layers")
        maker: Any = makers.pop()
        module = self.gone.get(maker, maker)
        if not isinstance(module, _LAYERS):
            raise _LeftError("no convolution or linear layer makes its input")
        what = f"{self.names[module]}, the layer before it,"
        original: Any = self.originals[module]
        self._check_layer(module, what)
        self._check_pairs(maker, norm, what)
        for call in self.watch.calls[norm]:
            assert call.maker is not None
            if not _same_channels(original, call.maker.output, call.input):
                raise _LeftError(f"the channels of {what} are not its own")
        weights = self.weights.get(module) or affine.in_float64(original)
        return module, self._fitting(original, affine.after(original, weights, scaled), what)

    def _after(self, norm: _BatchNorm, scaled: Affine) -> tuple[nn.Module, Weights]:
        """Return the layer that reads a batch norm's output, and its weights with both."""
        outputs = [call.output for call in self.watch.calls[norm]]
        readers = [
            each for where in outputs if where for each in self.watch.readers.get(where.memory, [])
        ]
        modules = {each if isinstance(each, str) else each.layer for each in readers}
        module: Any = modules.pop() if len(modules) == 1 else None
        if not isinstance(module, _LAYERS):
            read = ", ".join(sorted(set(map(self._reader, readers)))) or "nothing"
            raise _LeftError(f"its output is read by {read}, not by one such layer alone")
        what = f"{self.names[module] or 'the model'}, the layer after it,"
        original: Any = self.originals[module]
        self._check_layer(module, what)
        self._check_pairs(norm, module, "it")
        if not _is_stock(original):
            raise _LeftError(f"{what} has a forward of its own, which may pad")
        for call in self.watch.calls[module]:
            assert call.maker is not None
            if call.maker.output != call.input or not _same_channels(
                original, call.input, call.input
            ):
                raise _LeftError(f"the channels of {what} are not its own")
        inexact = affine.why_inexact(original, scaled)
        if inexact:
            raise _LeftError(f"{what} {inexact}")
        weights = affine.in_float64(original)  # A layer's own: what follows it is planned later.
        return module, self._fitting(original, affine.before(original, weights, scaled), what)

    def _check_pairs(self, maker: nn.Module, reader: nn.Module, what: str) -> None:
        """Refuse unless every output of one goes into the other, unseen, and nothing else does."""
        for call in self.watch.calls[maker]:
            where = call.output
            if where is None:
                raise _LeftError(f"{what} returns something else than one new tensor")
            readers = self.watch.readers[where.memory]
            takers = [each for each in self.watch.calls[reader] if each.maker is call]
            others = [each for each in readers if each not in takers]
            if others:
                raise _LeftError(f"what {what} returns is also read by {self._reader(others[0])}")
            if where.memory in self.watch.kept:
                raise _LeftError(f"what {what} returns is kept, or returned by the model")
            twice = any(call in more for each in takers for more in each.others.values())
            if len(takers) != 1 or twice:
                raise _LeftError(f"what {what} returns is not always passed on once")
        if len(self.watch.calls[maker]) != len(self.watch.calls[reader]):
            raise _LeftError(
                f"{self._reader(self.watch.calls[reader][0])} is called on more than that"
            )

    def _check_layer(self, module: Any, what: str) -> None:
        """Refuse a layer whose output is not a product with its own weight, plus its bias."""
        original: Any = self.originals[module]
        if any(map(is_lazy, original.parameters(False))):
            raise _LeftError(f"{what} is not initialized: run a batch through the model first")
        self._check_module(module, original, what)
        for key, tensor in original.named_parameters(recurse=False):
            where = place(tensor)
            shared = self.holders.get(where.memory, []) if where else []
            if len(shared) > 1:
                raise _LeftError(f"the {key} of {what} is shared: {', '.join(shared)}")
        if isinstance(module, nn.Linear) and not _is_stock(original):
            raise _LeftError(f"{what} has a forward of its own")
        knows_bias = {"bias", "super"} & names_read(type(original), "forward")
        if original.bias is None and not knows_bias:
            raise _LeftError(f"{what} has a forward of its own, which reads no bias")
        if isinstance(module, _ConvNd):
            for call in self.watch.calls[module]:
                self._check_convolution(module, call, what)

    def _check_convolution(self, module: _ConvNd, call: Call, what: str) -> None:
        own = [place(each) for each in (module.weight, module.bias) if each is not None]
        steps = [step for step in call.steps if set(own) & set(step.reads)]
        plain = [s for s in steps if s.name in _CONVOLUTIONS and [*s.reads[1:]] == own]
        if len(steps) != 1 or not plain or steps[0].makes != call.output:
            names = ", ".join(step.name for step in steps) or "nothing"
            raise _LeftError(f"{what} is no convolution with its own weight alone: {names} read it")
        assert call.output is not None
        memory = call.output.memory
        # Before it is returned, which is when its readers begin to be noted.
        readers = [
            *(
                s.name
                for s in call.steps
                if any(each and each.memory == memory for each in s.reads)
            ),
            *(name for name, taken, _ in call.parts if taken and taken.memory == memory),
        ]
        if readers:
            raise _LeftError(f"{what} does more than convolve: {readers[0]} reads what it makes")

    def _fitting(self, layer: Layer, weights: Weights, what: str) -> Weights:
        """Refuse weights that are too large for the layer's dtype."""
        largest = float(torch.cat([each.flatten() for each in weights]).abs().max())
        if not largest <= torch.finfo(layer.weight.dtype).max:
            raise _LeftError(f"{what} would have weights of {largest:.2g}: {layer.weight.dtype}")
        return weights

    def _reader(self, reader: Call | str) -> str:
        return reader if isinstance(reader, str) else self.names[reader.layer] or "the model"


def _is_stock(layer: nn.Module) -> bool:
    """Tell whether a layer computes with code of torch's own."""
    names = ("forward", "_conv_forward")
    return any(
        all(getattr(type(layer), name, None) is getattr(each, name, None) for name in names)
        for each in _STOCK
    )


def _same_channels(layer: Layer, made: Place | None, taken: Place | None) -> bool:
    """Tell whether the channels of a layer's batch are the second dimension of what is taken.

    Those of a linear layer are its last dimension, and stay it where all before become one.
    """
    if made is None or taken is None:
        return False
    if made == taken:
        return len(made.shape) == layer.weight.ndim
    channels = made.shape[-1]
    return (
        isinstance(layer, nn.Linear)
        and taken.shape == (math.prod(made.shape[:-1]), channels)
        and taken.strides == (channels, 1)
        and made.strides[-1] == 1
        and not any(stride % channels for stride in made.strides[:-1])
    )


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of parameters and buffers by the memory that they are in."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            where = None if tensor is None else place(tensor)
            if where is not None:
                holders.setdefault(where.memory, []).append(f"{name}.{key}" if name else key)
    return holders
