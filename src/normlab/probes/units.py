"""Units that are always zero, or almost always on the flat parts of their activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normlab.probes.activations import activations
from normlab.probes.objective import Objective

__all__ = ["Units", "units"]

_FLAT = 0.01  # σ′ below it passes back less than a 25th of the most that it can, 1/4.
_OFTEN = 0.95  # Of a unit's values on the flat parts: such a unit is saturated.


@dataclass
class Units:
    """What the units of one activation did, over all batches so far. A unit is a channel.

    Attributes:
        kind: relu, sigmoid or tanh.
        values: How many values of each unit were seen.
        silent: By unit, whether all of them were zero; for relu.
        flat: By unit, how many lay where the derivative is small; for sigmoid and tanh.
    """

    kind: str
    values: int = 0
    silent: Tensor = field(default_factory=lambda: torch.empty(0))
    flat: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def see(self, output: Tensor) -> None:
        """Count what an activation returned, of shape (N, C, …).

        tanh(x) = 2σ(2x) − 1, so its flat part is the sigmoid's at 2x.

        >>> units = Units("relu")
        >>> units.see(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> units.silent, units.values
        (tensor([ True, False]), 2)
        """
        if output.ndim < 2 or not output.numel():
            return
        channels = output.shape[1]
        if not self.values:
            self.silent = torch.ones(channels, dtype=torch.bool)
            self.flat = torch.zeros(channels, dtype=torch.int64)
        self.values += output.numel() // channels
        if self.kind == "relu":
            # Only units that were silent so far: after the first batch there are few.
            (left,) = self.silent.nonzero(as_tuple=True)
            if len(left):
                rest = output if len(left) == channels else output[:, left.to(output.device)]
                self.silent[left] = rest.transpose(0, 1).flatten(1).amax(1).cpu() == 0
            return
        level = output if self.kind == "sigmoid" else (output + 1) / 2
        flat = level * (1 - level) < _FLAT
        self.flat += flat.transpose(0, 1).flatten(1).sum(1).cpu()


@torch.no_grad()
def units(
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, float]]:
    """Return the shares of units that are dead, or saturated, by activation.

    In training mode: on these images a step of training would pass no gradient through the dead,
    and next to none through the saturated.

    Args:
        network: Left as it was, as by every probe.
        state: Values to run it with, by their names in it.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).
        lr: Not looked at.

    Returns:
        By activation (the module that calls it): of a ReLU `dead`, the share of units that are zero
        at all positions of all images; of a sigmoid or tanh `saturated`, the share of units with
        more than 95 in 100 values where the derivative is below .01 (tanh(x) as σ(2x)). Other
        activations have neither.

    >>> x = torch.tensor([[-1.0, 9.0], [-3.0, 4.0]])
    >>> units(nn.Sequential(nn.Sigmoid()), {}, x, torch.tensor([0, 1]), 0.1)
    {'0': {'saturated': 0.0}}
    """
    del lr
    seen: dict[str, Units] = {}

    def see(place: str, kind: str, input: Tensor, output: Tensor) -> None:
        del input
        kind = kind.replace("relu6", "relu")
        if kind in ("relu", "sigmoid", "tanh"):
            seen[place] = Units(kind)
            seen[place].see(output)

    objective = Objective(network, state, images, labels)
    with activations(network, see):
        objective.loss(objective.parameters)
    return {place: _shares(each) for place, each in seen.items() if each.values}


def _shares(found: Units) -> dict[str, float]:
    if found.kind == "relu":
        return {"dead": float(found.silent.double().mean())}
    often = found.flat > _OFTEN * found.values
    return {"saturated": float(often.double().mean())}
