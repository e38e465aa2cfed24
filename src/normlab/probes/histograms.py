"""How the values inside a network are distributed: what norms learned, and what layers return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.layers.norms import NORM_LAYERS
from normlab.probes.outputs import PASSING, outputs

__all__ = ["Histogram", "histogram", "inside"]

_BINS = 30  # As many as TensorBoard shows.


class Histogram(NamedTuple):
    """Counts of values in bins of equal width.

    Attributes:
        low: The least value; where the first bin begins.
        high: The largest, which belongs to the last bin.
        counts: One a bin.
    """

    low: float
    high: float
    counts: list[int]


def histogram(values: Tensor) -> Histogram | None:
    """Return the histogram of a tensor's finite values, in 30 bins; None if it has none.

    Where all are equal they are in the last bin, whose width is none, as TensorBoard has it.

    >>> histogram(torch.tensor([0.0, 0.01, 0.5, 1.0])).counts[:3]
    [2, 0, 0]
    """
    values = values.detach().double().flatten()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = map(float, values.aminmax())
    if low == high:
        return Histogram(low, high, [0] * (_BINS - 1) + [len(values)])
    # In halves, since the whole width of float64 is more than float64 holds.
    share = (values / 2 - low / 2) / (high / 2 - low / 2)
    bins = (share * _BINS).long().clamp_(max=_BINS - 1)
    return Histogram(low, high, torch.bincount(bins, minlength=_BINS).tolist())


@torch.no_grad()
def inside(
    network: nn.Module, state: Mapping[str, Tensor], x: Tensor
) -> dict[str, dict[str, Histogram]]:
    """Return how the values inside a network are distributed.

    Args:
        network: In the mode in which it is to be seen.
        state: The values to run it with, by their names in it; those that are missing are its own.
        x: What it is given.

    Returns:
        By layer, in the order of their calls: `output` of every layer that returns a floating-point
        tensor, at its first call, and `weight` (γ) and `bias` (β) of norms that have them; without
        layers that return what they get, such as `nn.Flatten`.

    >>> network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    >>> found = inside(network, {}, torch.ones(5, 3))
    >>> {layer: list(seen) for layer, seen in found.items()}
    {'0': ['output'], '1': ['output', 'weight', 'bias']}
    """
    found: dict[str, dict[str, Histogram]] = {}

    def see(name: str, layer: nn.Module, output: Any) -> None:
        if name in found or isinstance(layer, PASSING):
            return
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        # While it runs with the state, the layer holds the state's values.
        tensors = {"output": output}
        if isinstance(layer, NORM_LAYERS):
            tensors |= dict(layer.named_parameters(recurse=False))
        seen = {key: histogram(value) for key, value in tensors.items()}
        found[name] = {key: each for key, each in seen.items() if each is not None}

    with outputs(network, see):
        functional_call(network, dict(state), (x,))
    return found
