"""What the layers of a network return, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from normlab.layers.norms import NORM_LAYERS

__all__ = ["PASSING", "outputs"]

PASSING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
"""Layers that return what they get (dropout in eval mode), which another layer has shown or the
user knows."""


@contextmanager
def outputs(network: nn.Module, see: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Show what each layer returns, as long as the context lasts.

    A layer is a norm layer, or a module without modules of its own.

    Args:
        network: Left as it was, but for hooks that are gone when the context ends.
        see: Called after each call of a layer, with its qualified name, itself and its output,
            which a later layer may overwrite.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with outputs(network, lambda name, layer, output: print(name, tuple(output.shape))):
    ...     y = network(torch.ones(5, 3))
    0 (5, 2)
    1 (5, 2)
    """
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, NORM_LAYERS) or not list(module.children()):
                hooks.enter_context(module.register_forward_hook(_showing(name, see)))
        yield


def _showing(
    name: str, see: Callable[[str, nn.Module, Any], None]
) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, _, output: see(name, module, output)
