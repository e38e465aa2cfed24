"""The plain engine: one replica after another, each step as lean as it can be in eager torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data import Splits, scale
from normlab.layers import draw_dropout_from
from normlab.streams import stream
from normlab.training.recipe import Measurement, Outcome, Recipe, Replica

__all__ = ["evaluate", "train"]

_EVALUATION_BATCH = 5000


def train(
    network: nn.Module, replica: Replica, recipe: Recipe, splits: Splits
) -> Iterator[Measurement | Outcome]:
    """Train one replica, yielding each measurement as it is made and the outcome at the end.

    Nothing is read back from the device between evaluations. Batch order and dropout draw from the
    seed's own streams.

    Args:
        network: With its first values; trained in place.
        replica: Learning rate and seed.
        recipe: All the rest.
        splits: Evaluated in eval mode, each of them, after every epoch and at the declared steps.
    """
    started = time.perf_counter()
    images, labels = splits.dataset.images, splits.dataset.labels
    train_indices = splits.indices["train"]
    optimizer = _optimizer(network, replica, recipe)
    order = stream(replica.seed, "order")
    draw_dropout_from(stream(replica.seed, "dropout"), network)
    steps_per_epoch = recipe.steps_per_epoch(len(train_indices))
    losses = torch.zeros(())
    for step in range(1, recipe.epochs * steps_per_epoch + 1):
        epoch, position = divmod(step - 1, steps_per_epoch)
        if position == 0:
            shuffled = train_indices[torch.randperm(len(train_indices), generator=order)]
            network.train()
        batch = shuffled[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        loss = F.cross_entropy(network(scale(images[batch], recipe.scaling)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()
        ends_epoch = position + 1 == steps_per_epoch
        if ends_epoch or (recipe.evaluate_every and step % recipe.evaluate_every == 0):
            values = _evaluate_splits(network, splits, recipe) if losses.isfinite() else {}
            if not values or not all(map(math.isfinite, values.values())):
                yield Outcome(replica, "diverged", step, time.perf_counter() - started)
                return
            yield Measurement(replica, step, epoch + ends_epoch, values)
            network.train()
    yield Outcome(replica, "done", step, time.perf_counter() - started)


def evaluate(
    network: nn.Module, images: Tensor, labels: Tensor, indices: Tensor, scaling: str
) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy in eval mode, over all the indices.

    Args:
        network: Left in eval mode.
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        indices: Which of the N, int64.
        scaling: As `normlab.data.scale` takes it.
    """
    network.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        for batch in indices.split(_EVALUATION_BATCH):
            logits, target = network(scale(images[batch], scaling)), labels[batch]
            loss += F.cross_entropy(logits, target, reduction="sum")
            correct += (logits.argmax(1) == target).sum()
    return float(loss) / len(indices), float(correct) / len(indices)


def _evaluate_splits(
    network: nn.Module, splits: Splits, recipe: Recipe
) -> dict[tuple[str, str], float]:
    values = {}
    for split, indices in splits.indices.items():
        loss, accuracy = evaluate(
            network, splits.dataset.images, splits.dataset.labels, indices, recipe.scaling
        )
        values[split, "loss"], values[split, "accuracy"] = loss, accuracy
    return values


def _optimizer(network: nn.Module, replica: Replica, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=replica.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.Adam(
        network.parameters(), lr=replica.lr, weight_decay=recipe.weight_decay, fused=True
    )
