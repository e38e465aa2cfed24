"""What activations get, in three percentiles."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normlab.probes.activations import activations
from normlab.probes.objective import Objective

__all__ = ["percentiles"]

_SHARES = {"q15": 0.15, "q50": 0.5, "q85": 0.85}


@torch.no_grad()
def percentiles(
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, float]]:
    """Return the 15th, 50th and 85th percentiles of the input of every activation.

    In training mode: it is the distribution on which the next layers are trained.

    Args:
        network: Left as it was, as by every probe.
        state: Values to run it with, by their names in it.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).
        lr: Not looked at.

    Returns:
        By activation (the module that calls it): `q15`, `q50` and `q85` over all values of all
        images; and of the first unit, which is channel 0 at all its positions, `unit.q15`,
        `unit.q50` and `unit.q85`. Between two values it is interpolated linearly, as NumPy does.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, figure 1 (b, c), of a typical unit.

    >>> x = torch.arange(5.0).view(5, 1)
    >>> percentiles(nn.Sequential(nn.ReLU()), {}, x, torch.zeros(5).long(), 0.1)["0"]["q50"]
    2.0
    """
    del lr
    found: dict[str, dict[str, float]] = {}

    def see(place: str, kind: str, input: Tensor, output: Tensor) -> None:
        del kind, output
        if not input.numel():
            return
        found[place] = _of(input)
        if input.ndim > 1:
            found[place] |= {f"unit.{name}": value for name, value in _of(input[:, 0]).items()}

    objective = Objective(network, state, images, labels)
    with activations(network, see):
        objective.loss(objective.parameters)
    return found


def _of(values: Tensor) -> dict[str, float]:
    # Not `torch.quantile`, which takes 16 million values at most.
    ordered = values.flatten().sort().values
    last = len(ordered) - 1
    if ordered[last].isnan():
        return dict.fromkeys(_SHARES, math.nan)
    below = [math.floor(share * last) for share in _SHARES.values()]
    picked = ordered[[*below, *(min(place + 1, last) for place in below)]].double().tolist()
    return {
        name: low + (high - low) * (share * last - place)
        for (name, share), place, low, high in zip(
            _SHARES.items(), below, picked[:3], picked[3:], strict=True
        )
    }
