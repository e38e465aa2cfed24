"""How large gradients are, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from normlab.probes.objective import Objective, norm
from normlab.probes.outputs import PASSING, outputs

__all__ = ["gradients"]


def gradients(
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: float,
) -> dict[str, dict[str, float]]:
    """Return the sizes of the gradients by what layers return and by what they learn.

    In training mode, in which they pass through the batch's own statistics. L is the mean
    cross-entropy of the N images.

    Args:
        network: Left as it was, as by every probe.
        state: Values to run it with, by their names in it.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).
        lr: Not looked at.

    Returns:
        By layer: `output`, `Σᵢ ‖∂(N L)/∂hᵢ‖² / N` of what it returns for image i at its first call
        (the sum of all losses is differentiated, so that it does not shrink with N); and by the
        name of each trained parameter p, such as `weight`, `‖∂L/∂p‖`. Layers that return what they
        get, such as `nn.Flatten`, are passed over.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> state = {"0.weight": torch.zeros(2, 1)}
    >>> gradients(network, state, torch.ones(4, 1), torch.zeros(4).long(), 0.1)
    {'0': {'output': 0.5, 'weight': 0.7071067811865476}}
    """
    del lr
    found: dict[str, dict[str, float]] = {}

    def note(name: str, gradient: Tensor) -> None:
        found[name]["output"] = float(gradient.double().square().sum()) * len(images)

    def see(name: str, layer: nn.Module, output: Any) -> None:
        if name in found or isinstance(layer, PASSING) or not isinstance(output, Tensor):
            return
        if output.requires_grad:
            found[name] = {}
            # On the tensor, for a hook sees the gradient of what it is before others change it.
            output.register_hook(partial(note, name))

    objective = Objective(network, state, images, labels)
    with outputs(network, see):
        _, by_parameters = objective.gradient(objective.parameters)
    for name, gradient in by_parameters.items():
        layer, _, parameter = name.rpartition(".")
        found.setdefault(layer, {})[parameter] = norm(gradient)
    return {layer: sizes for layer, sizes in found.items() if sizes}
