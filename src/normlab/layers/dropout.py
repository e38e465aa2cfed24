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

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        keep = torch.empty_like(input).bernoulli_(1 - self.p, generator=self.generator)
        return input * keep.div_(1 - self.p)


def draw_dropout_from(generator: torch.Generator, network: nn.Module) -> None:
    """Let every `Dropout` of a network draw its masks from `generator`."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.generator = generator
