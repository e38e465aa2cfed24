"""What `normlab bench fleet` has trained, and what it asks of whoever trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.data import load
from normlab.networks import build_network
from normlab.streams import stream

__all__ = ["EVALUATED", "REPLICAS", "STEPS", "WORKS", "Peer", "Work", "layers_of"]

STEPS = 50
REPLICAS = 10
EVALUATED = 10_000  # Images: as many as the test sets of the works have.


@dataclass(frozen=True)
class Peer:
    """One way of doing a work.

    Attributes:
        train: Makes `steps` steps in the middle of an epoch, those of all replicas counted, and
            returns their mean loss as a float, or anything else if it has none.
        steps: How many.
        evaluate: Evaluates images in eval mode, and returns their mean loss likewise.
        images: How many, those of all replicas counted.
        close: Called at the end.
    """

    train: Callable[[], object]
    steps: int
    evaluate: Callable[[], object] | None = None
    images: int = 0
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        name: As it is printed.
        network: `mlp:` and the hidden sizes, or `lenet`.
        batch_size: Samples a step; an epoch's last, smaller batch is left out.
        optimizer: `adam` or `sgd`.
        lr: Learning rate.
        activation: Of the hidden layers.
        arm: The norm; `batch` is `torch.nn`'s for the peers here.
        init: As `build_network` takes it.
        dataset: A name for `normlab.data.load`, or `random` for random bytes and labels.
        image_shape: (C, H, W).
        images: How many an epoch has: of a data set its first ones.
        scaling: A key of `normlab.data.SCALINGS`.
        loader_workers: Processes of the tutorials' DataLoader.
        device: Where it is trained.
    """

    name: str
    network: str
    batch_size: int
    optimizer: str
    lr: float
    activation: str = "relu"
    arm: str = "batch"
    init: str = "torch"
    dataset: str = "mnist"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    images: int = 60_000
    scaling: str = "0..1"
    loader_workers: int = 2
    device: str = "cpu"

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self.images // self.batch_size

    def load(self) -> tuple[Tensor, Tensor]:
        """Return images (uint8, (N, C, H, W)) and labels (int64, (N,)), on the CPU."""
        if self.dataset == "random":
            generator = stream(0, "random images")
            shape = (self.images, *self.image_shape)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            return images, torch.randint(10, (self.images,), generator=generator)
        dataset = load(self.dataset)
        return dataset.images[: self.images], dataset.labels[: self.images]

    def build(self, seed: int) -> nn.Sequential:
        """Return the network of a seed, with torch's batch norm."""
        arm = {"batch": "torch-batch"}.get(self.arm, self.arm)
        return build_network(
            self.network,
            arm,
            seed,
            image_shape=self.image_shape,
            classes=10,
            activation=self.activation,
            init=self.init,
        ).to(self.device)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield the indices of a seed's batches, epoch after epoch."""
        generator = stream(seed, "order")
        while True:
            order = torch.randperm(self.images, generator=generator).to(self.device)
            yield from order.split(self.batch_size)[: self.steps_per_epoch]


WORKS = (
    Work("mlp 784-32-32-10, batch 32, Adam", "mlp:32,32", 32, "adam", 0.01),
    Work("mlp 784-512-512-10, batch 64, SGD", "mlp:512,512", 64, "sgd", 0.1),
    # CIFAR-10 does not come with the package; what its bytes say makes no difference to the time.
    Work(
        "mlp 3072-128-10, batch 32, Adam",
        "mlp:128",
        32,
        "adam",
        1e-4,
        dataset="random",
        image_shape=(3, 32, 32),
        images=50_000,
        scaling="-1..1",
    ),
    Work("LeNet, batch 256, SGD", "lenet", 256, "sgd", 0.9, activation="sigmoid", init="xavier"),
)


def layers_of(network: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Return the layers by name, in the order in which they are run."""
    return [(name, part) for name, part in network.named_modules() if not list(part.children())]
