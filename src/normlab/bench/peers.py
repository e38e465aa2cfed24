"""The loops that people write, and the products that nobody can leave out."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from normlab.bench.work import EVALUATED, REPLICAS, STEPS, Peer, Work, layers_of
from normlab.data import scale

__all__ = [
    "compiled_eager",
    "eager",
    "optimizer_of",
    "products",
    "stacked_products",
    "startup",
    "tutorial",
]

_EVALUATION_BATCH = 2000
_EPOCHS = 1000  # More than are ever measured, so that the tutorials' loader starts once.

# The tutorials' loop.


class _Images(Dataset[tuple[Tensor, int]]):
    """Images that become a PIL image and then a tensor, one by one, as torchvision's do."""

    def __init__(self, work: Work) -> None:
        images, labels = work.load()
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels = labels
        self.half = torch.full((work.image_shape[0], 1, 1), 0.5)
        self.centred = work.scaling == "-1..1"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.arrays[index])
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
        scaled = pixels.to(torch.float32).div(255)
        if self.centred:
            scaled = (scaled - self.half) / self.half
        return scaled, int(self.labels[index])


def _loader(work: Work, epochs: int) -> DataLoader[tuple[Tensor, int]]:
    """Return a loader of epochs on end: `shuffle=True` is the same sampler for one of them."""
    data = _Images(work)
    # A process of ours was spawned and would spawn; a tutorial gets what the platform starts with.
    start = multiprocessing.get_all_start_methods()[0] if work.loader_workers else None
    return DataLoader(
        data,
        batch_size=work.batch_size,
        sampler=RandomSampler(data, num_samples=epochs * len(data)),
        num_workers=work.loader_workers,
        drop_last=True,
        multiprocessing_context=start,
    )


def startup(work: Work) -> float:
    """Return the seconds in which the loader's processes start, give a batch, and end."""
    loader = _loader(work, 1)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        batches = iter(loader)
        next(batches)
        del batches
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def tutorial(work: Work) -> Peer:
    """Train as tutorials write it: DataLoader, stock optimizer, `.item()` at every step."""
    network = work.build(0)
    optimizer = optimizer_of(work)(network.parameters(), lr=work.lr)
    criterion = nn.CrossEntropyLoss()
    loader = iter(_loader(work, _EPOCHS))
    steps = 2 * min(STEPS, work.steps_per_epoch)

    def train() -> float:
        total = 0.0
        for _ in range(steps):
            images, labels = (each.to(work.device) for each in next(loader))
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / steps

    @torch.no_grad()
    def evaluate() -> float:
        network.eval()
        total = correct = 0.0
        for _ in range(steps):
            images, labels = (each.to(work.device) for each in next(loader))
            logits = network(images)
            total += criterion(logits, labels).item()
            correct += (logits.argmax(1) == labels).sum().item()
        network.train()
        return total / steps

    return Peer(train, steps, evaluate, steps * work.batch_size)


def optimizer_of(work: Work) -> Any:
    """Return the class of torch's optimizer."""
    return {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[work.optimizer]


# torch, with what it offers.


def eager(work: Work, *, compiled: bool = False) -> Peer:
    """Train with the data in memory and a fused optimizer, on all threads; evaluate at large."""
    network = work.build(0)
    optimizer = optimizer_of(work)(network.parameters(), lr=work.lr, fused=True)
    images, labels = (each.to(work.device) for each in work.load())
    batches = work.batches(0)
    steps = min(STEPS, work.steps_per_epoch)

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(scale(images[batch], work.scaling)), labels[batch])

    if compiled:
        # Where there are graphs, torch offers to replay them.
        mode = "default" if work.device == "cpu" else "reduce-overhead"
        loss_of = torch.compile(loss_of, fullgraph=True, mode=mode)

    def train() -> float:
        total = torch.zeros((), device=work.device)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(next(batches))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / steps

    @torch.no_grad()
    def evaluate() -> float:
        network.eval()
        total, correct = torch.zeros(2, device=work.device).unbind()
        indices = torch.arange(min(EVALUATED, len(images)), device=work.device)
        for batch in indices.split(_EVALUATION_BATCH):
            logits, y = network(scale(images[batch], work.scaling)), labels[batch]
            total += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
        network.train()
        return total.item() / min(EVALUATED, len(images))

    return Peer(train, steps, evaluate, min(EVALUATED, len(images)))


def compiled_eager(work: Work) -> Peer:
    """Train likewise, with batch, forward pass, loss and their backward pass compiled as one."""
    return eager(work, compiled=True)


# The matrix products and convolutions alone.


def products(work: Work, *, replicas: int = 1) -> Peer:
    """Make the matrix products and convolutions of a step, forward and backward, and no more.

    Args:
        work: What would be trained.
        replicas: How many networks' products are stacked; convolutions follow one another, which
            is faster on a CPU than any way of stacking them.
    """
    operations: list[Callable[[], object]] = []
    steps = min(STEPS, work.steps_per_epoch)
    x = torch.rand(work.batch_size, *work.image_shape, device=work.device)
    with torch.no_grad():
        for _, layer in layers_of(work.build(0)):
            y = layer(x)
            first = not operations  # Nobody asks for the gradient of the images.
            if isinstance(layer, nn.Linear):
                operations += _linear(x, layer.weight, y, replicas, first)
            elif isinstance(layer, nn.Conv2d):
                operations += [_convolution(x, layer.weight.detach(), y, first)] * replicas
            x = y

    def train() -> None:
        with torch.no_grad():
            for _ in range(max(1, steps // replicas)):
                for operation in operations:
                    operation()
            torch.zeros(1, device=work.device).tolist()  # Which waits until a device is through.

    return Peer(train, max(1, steps // replicas) * replicas)


def stacked_products(work: Work) -> Peer:
    """Make the products of a fleet."""
    return products(work, replicas=REPLICAS)


def _linear(
    x: Tensor, weight: Tensor, y: Tensor, replicas: int, first: bool
) -> list[Callable[[], object]]:
    x, weight, y = (each.detach().repeat(replicas, 1, 1) for each in (x, weight, y))
    pairs = [(x, weight.mT), (y.mT, x)] + [(y, weight)] * (not first)
    if replicas == 1:
        pairs = [(a[0], b[0]) for a, b in pairs]
    return [_product(a, b) for a, b in pairs]


def _product(a: Tensor, b: Tensor) -> Callable[[], object]:
    out = a @ b
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return lambda: multiply(a, b, out=out)


def _convolution(x: Tensor, weight: Tensor, y: Tensor, first: bool) -> Callable[[], object]:
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    wanted = [not first, True, False]
    forward, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward

    def both() -> None:
        # Their variants with `out=` compute and then copy, so they would be slower.
        forward(x, weight, None, *geometry)
        backward(y, x, weight, None, *geometry, wanted)

    return both
