"""Networks that claims look into after training: each is trained once, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from normlab.data import Splits, gather, load, split
from normlab.files import replace
from normlab.networks import build_network
from normlab.training import Recipe, Replica, train
from normlab.training.fleet import Engine

__all__ = ["FASHION", "accuracy", "batches", "fashion", "perceptron", "trained"]

FASHION = Recipe(
    dataset="fashion-mnist",
    network="mlp:128,128,128,128",
    optimizer="sgd",
    batch_size=128,
    epochs=5,
)
"""A perceptron of four layers on Fashion-MNIST."""

SETUP = (
    "Fashion-MNIST, 55,000 training images; a perceptron 784-128-128-128-128-10 with ReLU, torch's "
    "own first weights; SGD, batches of 128, 5 epochs"
)
"""`FASHION` in words."""

_BATCH = 2000


@cache
def fashion() -> Splits:
    """Return Fashion-MNIST, 5,000 training images held out."""
    return split(load(FASHION.dataset, progress=False), FASHION.validation)


def perceptron(arm: str, seed: int) -> nn.Module:
    """Return the network of `FASHION` with its first values."""
    data = fashion().dataset
    return build_network(
        FASHION.network, arm, seed, image_shape=data.image_shape, classes=data.classes
    )


def trained(
    folder: Path, replica: Replica, build: Callable[[str, int], nn.Module] = perceptron
) -> nn.Module:
    """Return a network that was trained by `FASHION`, in eval mode; one diverged has NaN in it.

    Args:
        folder: Where networks are kept.
        replica: Its arm is what `build` gets, and what the file is called by.
        build: From arm and seed to a network with its first values.
    """
    from safetensors.torch import load as from_bytes
    from safetensors.torch import save

    versions = [metadata.version(package) for package in ("normlab", "torch")]
    declared = json.dumps([FASHION.model_dump(mode="json"), replica, versions])
    digest = hashlib.sha256(declared.encode()).hexdigest()[:16]
    path = folder / "trained" / f"{digest}.safetensors"
    network = build(replica.arm, replica.seed)
    if path.is_file():
        network.load_state_dict(from_bytes(path.read_bytes()))
    else:
        for _ in train(network, replica, FASHION, fashion(), Engine("looped", "native")):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, save(network.state_dict()))
    return network.eval()


def batches(indices: Tensor, size: int) -> Iterable[Tensor]:
    """Yield images of Fashion-MNIST, from 0 to 1, in batches."""
    images = fashion().dataset.images
    return (gather(images, each, FASHION.scaling) for each in indices.split(size))


@torch.no_grad()
def accuracy(
    network: nn.Module, indices: Tensor, change: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Return the share of images that a network in eval mode is right about; NaN if it diverged.

    Args:
        network: Returns logits.
        indices: Of images.
        change: What happens to the images before.
    """
    labels, right = fashion().dataset.labels[indices].split(_BATCH), 0
    for x, y in zip(batches(indices, _BATCH), labels, strict=True):
        logits = network(x if change is None else change(x))
        if not logits.isfinite().all():
            return float("nan")
        right += int((logits.argmax(1) == y).sum())
    return right / len(indices)
