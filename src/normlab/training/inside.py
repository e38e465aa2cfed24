"""What is looked at inside the replicas of a fleet, and on which images."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normlab.layers import NORM_LAYERS

__all__ = ["PROBED", "SHOWN", "learned", "spread"]

SHOWN = 128
"""Images that histograms of activations are made of."""
PROBED = 256
"""Images that probes read on: of 256 values the median is known to a thirteenth of their standard
deviation, and a unit that answers to one image in a hundred looks dead once in thirteen times. More
would cost more memory than a step of training does where images are large."""


def spread(indices: Tensor, most: int) -> Tensor:
    """Return at most so many indices from all over: a folder has its images class by class.

    >>> import torch
    >>> spread(torch.arange(10), 4).tolist()
    [0, 2, 4, 6]
    """
    return indices[:: max(1, len(indices) // most)][:most]


def learned(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Return what a network's norm layers hold in a state, as `Outcome.learned` has it."""
    norms = (name for name, each in network.named_modules() if isinstance(each, NORM_LAYERS))
    return {
        norm: {
            name: state[f"{norm}.{name}"].flatten().tolist()
            for name in ("weight", "bias", "running_mean", "running_var")
            if f"{norm}.{name}" in state
        }
        for norm in norms
    }
