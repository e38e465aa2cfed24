"""What activations get and what they return, while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

__all__ = ["activations"]

_KINDS = {
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("sigmoid", "hardsigmoid", "tanh", "hardtanh", "hardswish", "softplus"),
}

See = Callable[[str, str, Tensor, Tensor], None]
"""Gets the place of an activation, its kind (its function's name in torch), its input as it was
before the call, and its output."""


@contextmanager
def activations(network: nn.Module, see: See) -> Iterator[None]:
    """Show every activation, as long as the context lasts: modules, functions, and fused ones.

    To see what the activation inside a batch norm of normlab gets, the layer is called a second
    time without it. In training that moves running statistics twice, so it is for a network that
    runs with copies of its buffers.

    Args:
        network: Left as it was, but for hooks that are gone when the context ends.
        see: Called after each activation. The place is the innermost module that is running, with
            the number of the call if it is not its first.

    >>> network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with activations(network, lambda place, kind, *both: print(place, kind)):
    ...     y = network(torch.ones(5, 3))
    1 relu
    """
    watching = _Watching(see)
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            enter = partial(watching.enter, name)
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(watching.leave))
        hooks.enter_context(watching)
        yield


class _Watching(TorchFunctionMode):
    """Sees every call of a function of torch, and every module."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see
        # Of each running module: its name, and what its own activation gets, if it has one.
        self._running: list[tuple[str, Tensor | None]] = []
        self._calls: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        kind = getattr(func, "__name__", "").rstrip("_")
        input = args[0] if args else kwargs.get("input")
        is_inside = bool(self._running) and self._running[-1][1] is not None
        if kind not in _KINDS or not isinstance(input, Tensor) or is_inside:
            return func(*args, **kwargs)
        before = input.detach().clone()  # The call may be in place.
        result = func(*args, **kwargs)
        self._activated(kind, before, result)
        return result

    def _activated(self, kind: str, input: Tensor, output: Tensor) -> None:
        name = self._running[-1][0] if self._running else ""
        self._calls[name] = self._calls.get(name, 0) + 1
        place = name if self._calls[name] == 1 else f"{name} (call {self._calls[name]})"
        self._see(place, kind, input, output)

    def enter(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        """Note that a module begins to run."""
        before = None
        if _activation(module) is not None:
            layer: Any = module
            activation, layer.activation = layer.activation, None
            try:
                with torch.no_grad():
                    before = layer.forward(*inputs, **named)
            finally:
                layer.activation = activation
        self._running.append((name, before))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note what a module returns."""
        del inputs
        _, before = self._running[-1]
        if before is not None:
            self._activated(str(_activation(module)), before, output)
        self._running.pop()


def _activation(module: nn.Module) -> str | None:
    """Return the activation that a layer of normlab does itself."""
    return getattr(module, "activation", None) if isinstance(module, _BatchNorm) else None
