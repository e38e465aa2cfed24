"""How much a layer's gradient changes when the layers before it take their step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normlab.probes.objective import Objective, norm

__all__ = ["covariate_shift"]


def covariate_shift(
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, float]]:
    """Return how much the gradient by each layer's weights moves when earlier layers are updated.

    G is the gradient of the loss by the layer's weights, which are its trained parameters of two
    axes or more, so that arms with norms and without have the same layers. G′ is that gradient, of
    the same images, after all trained parameters of layers that are called earlier, norms and
    biases too, took one step of plain SGD. In training mode, for it is about training's steps.

    Args:
        network: Left as it was, as by every probe.
        state: Values to run it with, by their names in it.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).
        lr: The replica's learning rate, which is the step's.

    Returns:
        By layer with weights and with learning layers before it: `shift`, `‖G − G′‖`, and `cosine`,
        `G · G′ / (‖G‖ ‖G′‖)`.

    Source: Santurkar, Tsipras, Ilyas and Mądry, "How Does Batch Normalization Help Optimization?",
    2018, definition 2.1.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> found = covariate_shift(network, {}, torch.ones(4, 2), torch.zeros(4).long(), 0.0)
    >>> found["1"]["shift"], round(found["1"]["cosine"], 6)
    (0.0, 1.0)
    """
    objective = Objective(network, state, images, labels)
    called, start = _first_calls(network, objective), objective.parameters
    _, slope = objective.gradient(start)
    layers: dict[str, list[str]] = {}
    for name in start:
        layers.setdefault(_layer(name, called), []).append(name)
    moved, found = dict(start), {}
    for layer in sorted(layers, key=called.__getitem__):
        weights = tuple(name for name in layers[layer] if start[name].ndim > 1)
        # Where nothing has moved there is nothing to see.
        if weights and any(moved[name] is not start[name] for name in start):
            _, after = objective.gradient(moved, weights)
            found[layer] = _compared([slope[w] for w in weights], [after[w] for w in weights])
        moved |= {name: start[name] - lr * slope[name] for name in layers[layer]}
    return found


def _compared(one: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    product = float(sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)))
    lengths = norm(*one) * norm(*other)
    return {
        "shift": norm(*(a - b for a, b in zip(one, other, strict=True))),
        "cosine": product / lengths if lengths else float("nan"),
    }


def _first_calls(network: nn.Module, objective: Objective) -> dict[str, int]:
    """Return the places of modules in the order of their first calls, by name."""
    called: dict[str, int] = {}

    def see(name: str, *_: Any) -> None:
        called.setdefault(name, len(called))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(see, name)))
        objective.loss(objective.parameters)
    return called


def _layer(parameter: str, called: Mapping[str, int]) -> str:
    """Return the innermost module around a parameter that is called; the network itself is."""
    layer = parameter.rpartition(".")[0]
    while layer not in called:
        layer = layer.rpartition(".")[0]
    return layer
