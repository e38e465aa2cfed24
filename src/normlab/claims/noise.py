"""A perceptron with batch norms, and one whose hidden values are made unstable after them.

The noise draws from a replica's stream as dropout does, and so it is a kind of dropout here.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from normlab.layers import Dropout

__all__ = ["Factor", "Offset", "noisy_perceptron", "steady_perceptron"]

_CENTERS = 0.5  # Of offsets: a step's centre is at most so far from 0, in deviations of a norm.
_SCALES = 0.25  # Of factors: at most so far from 1.
_JITTER = 0.1  # The standard deviation of both, from sample to sample.


class _Noise(Dropout):
    """Changes its input in training mode alone, by random numbers that are drawn as masks are."""

    _middle, _width = 0.0, 0.0

    def __init__(self) -> None:
        super().__init__(p=0.5)  # Above zero, by which training knows a layer that draws.

    def draw(self, like: Tensor) -> Tensor:
        """Return the next noise for an input of shape (N, C): of each channel's centre, redrawn."""
        bounds = self._middle - self._width, self._middle + self._width
        centers = torch.empty_like(like[:1]).uniform_(*bounds, generator=self.generator)
        return torch.empty_like(like).normal_(0, _JITTER, generator=self.generator).add_(centers)


class Offset(_Noise):
    """Adds to each channel a number that is another at every step, and a little more a sample.

    >>> layer = Offset()
    >>> layer.generator = torch.Generator().manual_seed(0)
    >>> layer(torch.zeros(2, 3)).shape, float(layer.eval()(torch.zeros(1, 3)).abs().max())
    (torch.Size([2, 3]), 0.0)
    """

    _width = _CENTERS

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return input + (self.draw(input) if self.mask is None else self.mask)


class Factor(_Noise):
    """Multiplies each channel by a number around 1 that is another at every step and sample."""

    _middle, _width = 1.0, _SCALES


def steady_perceptron() -> nn.Sequential:
    """Return 784-128-128-128-128-10 with batch norms before its ReLUs."""
    return _perceptron(is_noisy=False)


def noisy_perceptron() -> nn.Sequential:
    """Return the same with noise between each norm and its ReLU; the first weights are the same."""
    return _perceptron(is_noisy=True)


def _perceptron(*, is_noisy: bool) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    widths = [784, 128, 128, 128, 128]
    for i in range(len(widths) - 1):
        noise = {"factor": Factor(), "offset": Offset()} if is_noisy else {}
        layers: dict[str, nn.Module] = {
            "linear": nn.Linear(widths[i], widths[i + 1]),
            "norm": nn.BatchNorm1d(widths[i + 1]),
            **noise,
            "activation": nn.ReLU(),
        }
        parts.append((f"hidden{i}", nn.Sequential(OrderedDict(layers))))
    parts.append(("output", nn.Linear(widths[-1], 10)))
    return nn.Sequential(OrderedDict(parts))
