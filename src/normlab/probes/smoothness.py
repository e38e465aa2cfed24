"""How much the loss and its gradient change along the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from normlab.probes.objective import Objective, norm

__all__ = ["smoothness"]

# Five of each, for each is a pass there and back: ten of them cost a sixth of a fast training.
_STEPS = [0.1 + (4 - 0.1) * i / 4 for i in range(5)]  # In learning rates.
_RELATIVE = [10 ** (-4 + 3 * i / 4) for i in range(5)]  # In lengths of all parameters.


def smoothness(
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, float]]:
    """Return how much the loss L and its gradient g change on a way down from the weights w.

    In training mode, for that is the loss that training goes down. A network whose weights are
    larger and that computes the same, as it may before a norm, has a smaller gradient, and a step
    of the same length does less: so the way is measured in shares of the weights' length too.

    Args:
        network: Left as it was, as by every probe.
        state: Values to run it with, by their names in it.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).
        lr: The replica's learning rate.

    Returns:
        Of the whole network, which is the layer `""`, over five η evenly from 0.1 to 4 times `lr`:
        `loss.range`, `max L(w − ηg) − min L(w − ηg)`, and `gradient.change`,
        `max ‖g(w − ηg) − g(w)‖`; and as `relative.loss.range` and `relative.gradient.change` the
        same over five η for which `η‖g‖/‖w‖` goes from 1e-4 to 1e-1 by a constant factor. w and g
        are all trained parameters together.

    Source: Santurkar, Tsipras, Ilyas and Mądry, "How Does Batch Normalization Help Optimization?",
    2018, figure 4, for the absolute steps.

    >>> import torch
    >>> x, y = torch.ones(4, 1), torch.zeros(4).long()
    >>> found = smoothness(nn.Linear(1, 2), {}, x, y, 0.1)
    >>> list(found[""])
    ['loss.range', 'gradient.change', 'relative.loss.range', 'relative.gradient.change']
    """
    objective = Objective(network, state, images, labels)
    _, slope = objective.gradient(objective.parameters)
    length = norm(*slope.values())
    relative = norm(*objective.parameters.values()) / length if length else math.nan
    ways = {
        "": [share * lr for share in _STEPS],
        "relative.": [share * relative for share in _RELATIVE],
    }
    found: dict[str, float] = {}
    for prefix, way in ways.items():
        found[f"{prefix}loss.range"], found[f"{prefix}gradient.change"] = _along(
            objective, slope, way
        )
    return {"": found}


def _along(
    objective: Objective, slope: Mapping[str, Tensor], way: Sequence[float]
) -> tuple[float, float]:
    losses, changes = [], []
    for step in way:
        there = {name: each - step * slope[name] for name, each in objective.parameters.items()}
        loss, gradient = objective.gradient(there)
        losses.append(loss)
        changes.append(norm(*(gradient[name] - slope[name] for name in slope)))
    if any(math.isnan(each) for each in (*losses, *changes)):
        return math.nan, math.nan
    return max(losses) - min(losses), max(changes)
