"""Units that are always zero, or almost always on the flat parts of their activation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Units"]

_FLAT = 0.01  # σ′ below it passes back less than a 25th of the most that it can, 1/4.


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
