"""Layers that become others in place, and remember what they were.

The object stays, so that all who hold the layer hold the new one, and so do its hooks and its mode.
What the new class has no room for lies in a plain attribute: in no state dict, and in no
optimizer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Memory", "become", "memories", "undo"]

_ATTRIBUTE = "_was_before_conversion"
_TENSORS = ("_parameters", "_buffers")
# A module's mode, hooks and submodules, whatever its class.
_OF_A_CLASS = {*_TENSORS, "_non_persistent_buffers_set"}
_COMMON = vars(nn.Module()).keys() - _OF_A_CLASS


class Memory(NamedTuple):
    """What a layer was.

    Attributes:
        cls: Its class.
        kinds: The names by which one asks for what it was.
        attributes: What it had, without what the present layer has in its place.
        living: The names of what the present layer has, which are as they are there.
        dtype: Of its tensors, to see whether the layer was cast since.
    """

    cls: type[nn.Module]
    kinds: frozenset[str]
    attributes: dict[str, Any]
    living: frozenset[str]
    dtype: torch.dtype | None


def become(
    layer: nn.Module,
    new: nn.Module,
    living: Collection[str],
    kinds: Collection[str] = (),
) -> None:
    """Make a layer what another one is, in place.

    Args:
        layer: To be changed; its mode and its hooks stay.
        new: What it becomes, with the parameters and buffers that it is to have.
        living: The names of attributes, parameters and buffers that `new` has from `layer`.
        kinds: By which `undo` is asked for what it was; without one it does not remember.

    >>> layer = nn.BatchNorm2d(4)
    >>> new = nn.GroupNorm(2, 4)
    >>> new.weight, new.bias = layer.weight, layer.bias
    >>> become(layer, new, ["weight", "bias"], ["torch-batch"])
    >>> layer
    GroupNorm(2, 4, ...)
    >>> undo(layer)
    ['running_mean', 'running_var', 'num_batches_tracked']
    >>> layer
    BatchNorm2d(4, ...)
    """
    before, living = vars(layer), {*living} - {_ATTRIBUTE, *_OF_A_CLASS}
    after = vars(new) | {name: before[name] for name in _COMMON}
    tensors = [each for kind in _TENSORS for each in before[kind].values()]
    # A lazy layer turns into another by itself, and would not be what it was.
    if kinds and not any(map(is_lazy, tensors)):
        attributes = {
            name: value
            for name, value in before.items()
            if name not in _COMMON and name not in living
        }
        for kind in _TENSORS:
            attributes[kind] = {
                name: None if name in living else value for name, value in before[kind].items()
            }
        after[_ATTRIBUTE] = Memory(
            type(layer), frozenset(kinds), attributes, frozenset(living), _dtype(layer)
        )
    _set(layer, type(new), after)


def memories(layer: nn.Module) -> list[Memory]:
    """Return what a layer was, the latest first."""
    found: list[Memory] = []
    attributes = vars(layer)
    while memory := attributes.get(_ATTRIBUTE):
        found.append(memory)
        attributes = memory.attributes
    return found


def undo(layer: nn.Module) -> list[str]:
    """Make a layer what it was before it last became another, in place.

    What it had in between is as it is now; all else is as it was then, on the layer's device, and
    of its type if that has changed.

    Returns:
        The names of the parameters and buffers that are as they were then.
    """
    memory: Memory = vars(layer)[_ATTRIBUTE]
    now = vars(layer)
    after = memory.attributes | {name: now[name] for name in _COMMON}
    after |= {name: now[name] for name in memory.living if name in now}
    dtype, returned = _dtype(layer), []
    for kind in _TENSORS:
        after[kind] = dict(after[kind])
        for name, value in after[kind].items():
            if name in memory.living:
                after[kind][name] = now[kind].get(name)
            elif value is not None:
                after[kind][name] = _cast(value, layer, memory.dtype, dtype)
                returned.append(name)
    _set(layer, memory.cls, after)
    return returned


def _set(layer: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    layer.__class__ = cls
    object.__setattr__(layer, "__dict__", attributes)


def _dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the type of what a layer holds, parameters first; None of an identity."""
    tensors = (*layer.parameters(), *layer.buffers())
    return next((each.dtype for each in tensors if each.is_floating_point()), None)


def _cast(
    value: Tensor, layer: nn.Module, then: torch.dtype | None, now: torch.dtype | None
) -> Tensor:
    """Follow what `to` has done to a layer since."""
    tensors = (*layer.parameters(), *layer.buffers())
    device = tensors[0].device if tensors else value.device
    dtype = now if now is not None and value.dtype == then else value.dtype
    if (device, dtype) == (value.device, value.dtype):
        return value
    moved = value.detach().to(device, dtype)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(moved, requires_grad=value.requires_grad)
    return moved
