"""The block that every network here is made of: a layer with weights, and slots around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from normlab.layers import Dropout, NormConstructor

__all__ = ["ACTIVATIONS", "Slots", "block"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


@dataclass(frozen=True)
class Slots:
    """What stands around the layers of a network.

    Attributes:
        norm: Builds the normalization layer, or None for no normalization.
        position: `pre` or `post` the activation, or on the layer's `input`.
        activation: A key of `ACTIVATIONS`.
        dropout: Probability of dropout after the activation of fully connected layers.
    """

    norm: NormConstructor | None = None
    position: str = "pre"
    activation: str = "relu"
    dropout: float = 0.0


def block(layer: nn.Linear | nn.Conv2d, slots: Slots) -> nn.Sequential:
    """Return a layer with its norm, activation and dropout, in the order that `slots` says.

    >>> print(block(nn.Linear(4, 2), Slots(dropout=0.5)))
    Sequential(
      (linear): Linear(in_features=4, out_features=2, bias=True)
      (activation): ReLU()
      (dropout): Dropout(p=0.5, inplace=False)
    )
    """
    if isinstance(layer, nn.Linear):
        name, spatial, width_in, width_out = "linear", 0, layer.in_features, layer.out_features
    else:
        name, spatial, width_in, width_out = "conv", 2, layer.in_channels, layer.out_channels
    parts: list[tuple[str, nn.Module]] = [
        (name, layer),
        ("activation", ACTIVATIONS[slots.activation]()),
    ]
    if slots.norm is not None:
        norm = slots.norm(width_in if slots.position == "input" else width_out, spatial)
        if norm is not None:
            place = {"input": 0, "pre": 1, "post": 2}[slots.position]
            parts.insert(place, ("norm", norm))
    if slots.dropout and spatial == 0:
        parts.append(("dropout", Dropout(slots.dropout)))
    return nn.Sequential(OrderedDict(parts))
