"""A model's norm layers, exchanged for those of another kind."""

from __future__ import annotations

from torch import Tensor, nn

from normlab.errors import InputError
from normlab.layers import NORM_LAYERS, norm_constructor
from normlab.surgery.kinds import calls_noted, equivalent
from normlab.surgery.memory import become

__all__ = ["exchange_norms"]


def exchange_norms(model: nn.Module, norm: str | None, example: Tensor) -> list[str]:
    """Put other norm layers in the place of a model's, in place.

    A new layer has the weight, bias and running statistics of the old one where it has some of
    their shape, and its type and device; a batch norm in the place of a batch norm has its options
    too. Hooks stay. Layers that the model has elsewhere keep what they have: a
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

    >>> import torch
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
    with calls_noted(model, found) as calls:
        model(example)
    news = {}  # All of them before the first is put in, so that a model is not left between two.
    for name, layer in found.items():
        _check_class(name, layer)
        news[name] = equivalent(name, layer, construct, calls[name])
    for name, (new, living) in news.items():
        become(found[name], new, living)
    return list(found)


def _check_class(name: str, layer: nn.Module) -> None:
    own = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    if own.__module__.partition(".")[0] not in ("torch", "normlab"):
        raise InputError(
            f"{name}: {type(layer).__name__} may do more than normalize, and so nothing else can "
            "take its place"
        )
