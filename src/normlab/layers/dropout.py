"""Dropout that draws from a generator of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout", "draw_dropout_from"]


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` whose masks come from `generator`, so that the global RNG stays untouched.

    Args:
        p: The probability that a value is set to zero; the rest is scaled by 1/(1−p).

    >>> layer = Dropout(0.5)
    >>> draw_dropout_from(torch.Generator().manual_seed(0), layer)
    >>> sorted(set(layer(torch.ones(100)).tolist()))
    [0.0, 2.0]
    """

    generator: torch.Generator | None = None
    mask: Tensor | None = None
    """Multiplies the next inputs if it is there, in place of a drawn one: for programs that are
    traced once and get their random numbers from outside."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return input * (self.draw(input) if self.mask is None else self.mask)

    def draw(self, like: Tensor) -> Tensor:
        """Return the next mask, like a tensor: 0 where a value is dropped, 1/(1−p) elsewhere."""
        # Where the generator is, so that a seed has the same masks on every device.
        where = like.device if self.generator is None else self.generator.device
        keep = torch.empty_like(like, device=where).bernoulli_(1 - self.p, generator=self.generator)
        return (keep.div_(1 - self.p) if self.p < 1 else keep).to(like.device)


def draw_dropout_from(generator: torch.Generator, network: nn.Module) -> None:
    """Let every `Dropout` of a network draw its masks from `generator`."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.generator = generator
