"""What several claims are measured with: images, networks, and what is made of their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normlab.data import gather, load
from normlab.layers import NORM_LAYERS
from normlab.networks import build_network
from normlab.streams import stream

__all__ = ["NO_EPS", "apart", "hidden_layers", "images", "network"]

NO_EPS = 1e-30
"""As good as none beside any variance here, in float32 too; batch norm wants one above zero."""


def images(seed: int, count: int, dataset: str = "mnist") -> tuple[Tensor, Tensor]:
    """Return training images, drawn for a seed without replacement.

    A larger draw of the same seed begins with a smaller one.

    Args:
        seed: Of the draw.
        count: How many; no more than there are.
        dataset: As `normlab.data.load` takes it.

    Returns:
        float32 in 0..1, shape (count, C, H, W), and their labels, shape (count,).

    >>> images(0, 4)[0].shape
    torch.Size([4, 1, 28, 28])
    """
    loaded = load(dataset)
    order = torch.randperm(loaded.train_size, generator=stream(seed, "claims", "images"))
    chosen = order[:count]
    return gather(loaded.images, chosen, "0..1"), loaded.labels[chosen]


def network(
    name: str,
    arm: str,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    eps: float | None = None,
) -> nn.Sequential:
    """Return a network for images of 28×28 pixels and ten classes, with its first values.

    Args:
        name: As `build_network` takes it.
        arm: Likewise.
        seed: Of the first values, which are the same in either dtype but for rounding.
        dtype: Of weights and buffers.
        eps: ε of the norms; None leaves it as it is.

    >>> network("mlp:8", "batch", 0, eps=NO_EPS).hidden0.norm.eps
    1e-30
    """
    built = build_network(name, arm, seed, image_shape=(1, 28, 28), classes=10).to(dtype)
    for module in built.modules():
        if eps is not None and isinstance(module, NORM_LAYERS):
            module.eps = eps
    return built


def hidden_layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers with weights of a network of `network`, but for the output layer.

    >>> [layer.out_features for layer in hidden_layers(network("mlp:8,4", "batch", 0))]
    [8, 4]
    """
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "output"
    ]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return max |found − wanted| / max |wanted|; NaN if either has one.

    >>> apart(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    """
    return float((found - wanted).abs().max() / wanted.abs().max())
