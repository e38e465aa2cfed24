"""The loss that training goes down, as a function of parameters that may be others than its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Objective", "norm"]

Parameters = Mapping[str, Tensor]


class Objective:
    """A network's mean cross-entropy on some images, as a training step has it.

    That is in training mode, in which batch norms normalize by the images themselves. Dropout alone
    is off: its noise would be measured too, and its random numbers belong to training. Nothing of
    the network or of the state is changed, for it runs with copies.

    Args:
        network: Left as it was.
        state: Values to run it with, by their names in it; those that are missing are its own.
        images: What it gets, shape (N, …).
        labels: int64, shape (N,).

    Attributes:
        parameters: Copies of those that are trained, by name.

    >>> layer = nn.Linear(1, 2, bias=False)
    >>> x, y = torch.ones(3, 1), torch.zeros(3).long()
    >>> objective = Objective(layer, {"weight": torch.zeros(2, 1)}, x, y)
    >>> loss, gradient = objective.gradient(objective.parameters)
    >>> round(loss, 3), gradient["weight"].tolist()
    (0.693, [[-0.5], [0.5]])
    """

    def __init__(
        self, network: nn.Module, state: Mapping[str, Tensor], images: Tensor, labels: Tensor
    ) -> None:
        self._network, self._images, self._labels = network, images, labels
        own = dict(network.named_parameters())
        values = {**own, **dict(network.named_buffers()), **state}
        trained = [name for name, each in own.items() if each.requires_grad]
        self.parameters = {name: values.pop(name).detach().clone() for name in trained}
        self._rest = values

    def loss(self, parameters: Parameters) -> Tensor:
        """Return the loss with these trained parameters."""
        rest = {name: each.detach().clone() for name, each in self._rest.items()}
        with _as_in_training(self._network):
            logits = functional_call(self._network, {**parameters, **rest}, (self._images,))
        return F.cross_entropy(logits, self._labels)

    def gradient(
        self, parameters: Parameters, by: tuple[str, ...] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and its gradient.

        Args:
            parameters: Where.
            by: Names of the parameters to differentiate by; all if not given. One that the network
                does not use has a gradient of zeros.
        """
        by = tuple(parameters) if by is None else by
        leaves = {name: parameters[name].detach().requires_grad_() for name in by}
        with torch.enable_grad():
            loss = self.loss({**parameters, **leaves})
            found = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return float(loss.detach()), dict(zip(by, found, strict=True))


@contextmanager
def _as_in_training(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        for module in modes:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def norm(*tensors: Tensor) -> float:
    """Return the Euclidean norm of all values together, summed up in float64.

    >>> norm(torch.tensor([3.0]), torch.tensor([[4.0]]))
    5.0
    """
    return float(sum(each.double().square().sum() for each in tensors)) ** 0.5
