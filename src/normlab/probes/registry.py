"""The probes that a study can name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from normlab.probes.gradients import gradients
from normlab.probes.percentiles import percentiles
from normlab.probes.shift import covariate_shift
from normlab.probes.smoothness import smoothness
from normlab.probes.units import units
from normlab.streams import generators_kept

__all__ = ["PROBES", "Probe", "read"]


class Probe(Protocol):
    """Measures inside a network, changes nothing of it, and never judges."""

    def __call__(
        self,
        network: nn.Module,
        state: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        lr: float,
    ) -> dict[str, dict[str, float]]:
        """Return numbers by layer (`""` is the whole network) and by their names.

        Args:
            network: Left as it was, whatever its mode.
            state: Values to run it with, by their names in it; those that are missing are its own.
            images: What it gets, shape (N, …).
            labels: int64, shape (N,).
            lr: The learning rate that it is trained at.
        """


PROBES: dict[str, Probe] = {
    "percentiles": percentiles,
    "gradients": gradients,
    "units": units,
    "smoothness": smoothness,
    "covariate-shift": covariate_shift,
}
"""By the names that studies know them by."""


def read(
    probes: Iterable[str],
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, dict[str, float]]]:
    """Return what probes measure, by probe, layer and name, without numbers that are not finite.

    The global generators are left as they were, whatever the network draws.

    Args:
        probes: Keys of `PROBES`.
        network: As for `Probe`, and so are the others.
        state: The same.
        images: The same.
        labels: The same.
        lr: The same.

    >>> import torch
    >>> x, y = torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]), torch.tensor([0, 1])
    >>> read(["units"], nn.ReLU(), {}, x, y, 0.1)
    {'units': {'': {'dead': 0.5}}}
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    with generators_kept():
        for probe in probes:
            found[probe] = {
                layer: {name: value for name, value in seen.items() if math.isfinite(value)}
                for layer, seen in PROBES[probe](network, state, images, labels, lr).items()
            }
    return found
