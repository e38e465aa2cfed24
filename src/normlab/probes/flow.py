"""How values flow through a network: what stands straight before, beside and after a batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Flow", "flow"]

_ACTIVATIONS = {
    **{"relu": "relu", "relu_": "relu", "relu6": "relu"},
    **{"sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh", "tanh_": "tanh"},
}
_SUMS = ("add", "add_", "__add__", "__iadd__", "__radd__")

See = Callable[[str, str, Tensor], None]
"""Gets the place of an activation, its kind (relu, sigmoid or tanh) and what it returns."""


@dataclass
class Flow:
    """What was seen while a network ran, by qualified names.

    Attributes:
        biases: By batch norm, the layer with a bias whose output it gets and nothing in between.
        added: The batch norms whose output is a summand, as at the end of a residual branch.
        dropouts: By batch norm, the dropout layers that were called before it.
        last: The batch norms whose output became the network's, with no weights in between.
        gates: The places of activations whose output is the network's.
    """

    biases: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    dropouts: dict[str, list[str]] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)


class _Origin(NamedTuple):
    kind: str
    name: str


@contextmanager
def flow(network: nn.Module, found: Flow, see: See) -> Iterator[Callable[[Any], None]]:
    """Follow the values of one forward pass.

    What is computed by functions is seen as what modules compute is; a value is followed through
    functions of one tensor.

    Args:
        network: Left as it was, but for hooks that are gone when the context ends.
        found: Gets what is seen.
        see: Called after each activation. The place is the innermost module that is running, with
            the number of the call if it is not its first.

    Yields:
        What to call with the network's output.

    >>> import torch
    >>> network, found = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU()), Flow()
    >>> with flow(network, found, lambda place, kind, output: print(place, kind)) as end:
    ...     end(network(torch.ones(5, 3)))
    2 relu
    >>> found.biases, found.last
    ({'1': '0'}, {'1'})
    """
    following = _Following(found, see)
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            enter, leave = partial(following.enter, name), partial(following.leave, name)
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        hooks.enter_context(following)
        yield following.end


class _Following(TorchFunctionMode):
    """Sees every call of a function of torch, and every module."""

    def __init__(self, found: Flow, see: See) -> None:
        super().__init__()
        self._found, self._see = found, see
        # Weak, so that no activation lives longer than in the user's own forward pass.
        self._origins: Any = WeakTensorKeyDictionary()
        self._places: Any = WeakTensorKeyDictionary()
        self._running: list[tuple[str, nn.Module]] = []
        self._calls: dict[str, int] = {}
        self._dropouts: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        version = _version(args)
        result = func(*args, **kwargs)
        # `to` and `contiguous` may return what they are given, untouched.
        untouched = args and result is args[0] and version == _version(args)
        if isinstance(result, Tensor) and not untouched:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            several = any(isinstance(each, (tuple, list)) for each in args[:1])  # cat and stack
            self._follow(getattr(func, "__name__", ""), given, result, several)
        return result

    def _follow(self, name: str, given: list[Tensor], result: Tensor, several: bool) -> None:
        origins = [self._origins.get(each) for each in given]
        if name in _SUMS and len(given) > 1:
            self._found.added |= {each.name for each in origins if each and each.kind == "norm"}
        self._origins.pop(result, None)  # In place, the result is what was given.
        if len(given) == 1 and not several and origins[0] and origins[0].kind == "norm":
            self._origins[result] = origins[0]
        if name in _ACTIVATIONS and not (self._running and _activates(self._running[-1][1])):
            self._activated(_ACTIVATIONS[name], result)

    def _activated(self, kind: str, output: Tensor) -> None:
        name = self._running[-1][0] if self._running else ""
        self._calls[name] = self._calls.get(name, 0) + 1
        place = name if self._calls[name] == 1 else f"{name} (call {self._calls[name]})"
        self._places[output] = place
        self._see(place, kind, output)

    def enter(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        """Note that a module begins to run."""
        self._running.append((name, module))
        if isinstance(module, _DropoutNd) and module.p > 0:
            self._dropouts.append(name)
        if isinstance(module, _BatchNorm):
            input = inputs[0] if inputs else named.get("input")
            origin = self._origins.get(input) if isinstance(input, Tensor) else None
            if origin and origin.kind == "bias":
                self._found.biases[name] = origin.name
            if self._dropouts:
                self._found.dropouts[name] = list(dict.fromkeys(self._dropouts))
            if len(inputs) > 1 or named.get("residual") is not None:
                self._found.added.add(name)

    def leave(
        self, name: str, module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any
    ) -> None:
        """Note what a module returns."""
        del inputs, named
        if isinstance(output, Tensor):
            if isinstance(module, _BatchNorm):
                self._origins[output] = _Origin("norm", name)
                if _activates(module):
                    self._activated(_ACTIVATIONS[str(module.activation)], output)
            elif isinstance(module, (nn.Linear, _ConvNd)) and module.bias is not None:
                self._origins[output] = _Origin("bias", name)
        self._running.pop()

    def end(self, output: Any) -> None:
        """Note what the network returned."""
        if isinstance(output, Tensor):
            origin = self._origins.get(output)
            if origin and origin.kind == "norm":
                self._found.last.add(origin.name)
            if output in self._places:
                self._found.gates.add(self._places[output])


def _version(args: tuple[Any, ...]) -> int | None:
    """Return how often the first argument was changed in place; None if that is not counted."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.is_inference():
        return None
    return first._version


def _activates(module: nn.Module) -> bool:
    """Tell whether a layer of normlab does the activation that follows it."""
    return isinstance(module, _BatchNorm) and getattr(module, "activation", None) in _ACTIVATIONS
