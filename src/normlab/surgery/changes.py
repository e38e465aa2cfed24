"""What folding changes in a model, apart from how it is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activated", "Changes", "Into", "Rest", "identity"]

Rest = Callable[[Any], nn.Module]
"""Makes what takes a batch norm's place from the batch norm."""


class Into(NamedTuple):
    """Where a batch norm went: the name of a layer, and its side of the batch norm."""

    layer: str
    side: str


class Activated(nn.Module):
    """What stays of a normlab batch norm that added a residual: the addition and the activation.

    >>> import torch
    >>> Activated(nn.ReLU())(torch.tensor([-3.0]), torch.tensor([1.0]))
    tensor([0.])
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return `activation(input + residual)`, of one shape."""
        return self.activation(input if residual is None else input + residual)


@dataclass
class Changes:
    """What folding does to a model, by qualified names.

    Attributes:
        folded: Where batch norms go.
        left: Why others stay.
        weights: The weight and the bias that a layer gets.
        rests: What takes a batch norm's place.
        functional: Modules whose own code calls batch norms.
        scales: The largest factor of a folded batch norm, with its smallest variance.
    """

    folded: dict[str, Into] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    rests: dict[str, Rest] = field(default_factory=dict)
    functional: list[str] = field(default_factory=list)
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Change a model in place; all models that this is done to share the new parameters."""
        for name, parameters in self.weights.items():
            layer = model.get_submodule(name)
            layer._parameters.update(zip(("weight", "bias"), parameters, strict=True))
        for name, rest in self.rests.items():
            norm = model.get_submodule(name)
            new = rest(norm)
            new.training = norm.training
            # In place, so that all who hold the batch norm hold what is left of it.
            vars(norm).clear()
            vars(norm).update(vars(new))
            norm.__class__ = type(new)

    def extreme(self) -> str:
        """Say which batch norm multiplies most."""
        name = max(self.scales, key=lambda each: self.scales[each][0])
        scale, variance = self.scales[name]
        return f"the largest factor, {scale:.2g}, is of {name} (least running_var {variance:.2g})"


def identity(_: nn.Module) -> nn.Module:
    """Leave nothing of a batch norm."""
    return nn.Identity()


ACTIVATIONS: dict[str | None, Rest] = {
    None: identity,
    "relu": lambda _: nn.ReLU(),
    "leaky_relu": lambda norm: nn.LeakyReLU(norm.negative_slope),
    "sigmoid": lambda _: nn.Sigmoid(),
    "silu": lambda _: nn.SiLU(),
}
"""By the name that normlab's batch norms give an activation."""
