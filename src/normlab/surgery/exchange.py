"""A model's norm layers, exchanged for those of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.errors import InputError
from normlab.layers import NORM_LAYERS, NormConstructor, norm_constructor
from normlab.surgery.models import modes_kept

__all__ = ["exchange_norms"]

_CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)


def exchange_norms(model: nn.Module, norm: str | None, example: Tensor) -> list[str]:
    """Put other norm layers in the place of a model's, in place.

    A new layer has the weight, bias and running statistics of the old one where it has some of
    their shape, and its type and device; a batch norm in the place of a batch norm has its options
    too. No hooks are carried over. Layers that the model has elsewhere keep what they have: a
    convolution that was built without a bias, because a norm followed it, stays so.

    Args:
        model: Its norm layers must be called as modules.
        norm: As `normlab.layers.norm_constructor` takes it; None puts an identity there.
        example: What the model is run on once, in eval mode, to see what its norm layers get.

    Returns:
        The names of the layers that were exchanged.

    Raises:
        InputError: There is no norm layer for a norm to take the place of, or one has no
            equivalent; the message names it.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> exchange_norms(model, "group:2", torch.zeros(2, 1, 5, 5))
    ['1']
    >>> model[1].num_groups
    2
    """
    construct = norm_constructor(norm) if norm else None
    found = {name: each for name, each in model.named_modules() if isinstance(each, NORM_LAYERS)}
    if norm and not found:
        raise InputError(f"the network has no norm layer that {norm} could take the place of")
    if "" in found:
        raise InputError("the network is a norm layer itself: there is nothing to exchange it in")
    with _inputs(model, found) as shapes:
        model(example)
    news = {}  # All of them before the first is put in, so that a model is not left between two.
    for name, layer in found.items():
        _check_class(name, layer)
        news[name] = (
            nn.Identity() if construct is None else _equivalent(name, layer, construct, shapes)
        )
    for name, layer in found.items():
        news[name].train(layer.training)
        for parent, child in _places(model, layer):
            setattr(parent, child, news[name])
    return list(found)


@contextmanager
def _inputs(model: nn.Module, found: dict[str, Any]) -> Iterator[dict[str, list[torch.Size]]]:
    """Note what the named layers get, while the model is in eval mode."""
    shapes: dict[str, list[torch.Size]] = {name: [] for name in found}

    def note(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            shapes[name].append([*inputs, *named.values()][0].shape)

        return see

    hooks = [
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, layer in found.items()
    ]
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _check_class(name: str, layer: nn.Module) -> None:
    own = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    if own.__module__.partition(".")[0] not in ("torch", "normlab"):
        raise InputError(
            f"{name}: {type(layer).__name__} may do more than normalize, and so nothing else can "
            "take its place"
        )


def _equivalent(
    name: str, layer: Any, construct: NormConstructor, shapes: dict[str, list[torch.Size]]
) -> nn.Module:
    kind = type(layer).__name__
    if not shapes[name]:
        raise InputError(f"{name}: {kind} is not called when the network is")
    for shape in shapes[name]:
        if not 2 <= len(shape) <= 5:
            raise InputError(f"{name}: {kind} gets {tuple(shape)}: expected (N, C), (N, C, L), …")
        whole = len(shape) == 2 or list(shape[1:]) == list(getattr(layer, "normalized_shape", ()))
        if isinstance(layer, _CHANNELS_LAST) and not whole:
            raise InputError(
                f"{name}: {kind} normalizes the last axes of {tuple(shape)}; the norms that "
                "could take its place have the channels on the second"
            )
    channels, spatial = shapes[name][0][1], len(shapes[name][0]) - 2
    try:
        new = construct(channels, spatial)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if new is None:
        raise InputError(
            f"{name}: {kind} gets one value per channel and sample, of which there is nothing to "
            "normalize"
        )
    if isinstance(new, _BatchNorm) and isinstance(layer, _BatchNorm):
        options = (layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        new = type(new)(channels, *options)
    for each in (*layer.parameters(), *layer.buffers()):
        if each.is_floating_point():
            new.to(each.device, each.dtype)
            break
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            ours, its = getattr(new, name, None), getattr(layer, name, None)
            if ours is not None and its is not None and ours.shape == its.shape:
                ours.copy_(its)
                ours.requires_grad_(its.requires_grad)
    return new


def _places(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children has a shared one once.
        if child is layer
    ]
