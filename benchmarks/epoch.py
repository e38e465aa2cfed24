"""Time of one epoch of the bundled study: a tutorial's loop, an eager loop, normlab's engine.

    python benchmarks/epoch.py [--repeats N] [--json]

Same network (784-32-32-10), batches of 32, Adam, 60,000 images. normlab's time has an evaluation of
the training images in it, which the other two leave out. The three take turns in one process, and
the medians are compared, because a machine's speed drifts. The tutorial's loop is a `DataLoader`
over a data set that turns one image at a time into a tensor; tutorials also decode it from a PIL
image, which is left out here, so their loops are slower than this one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import normlab
from normlab.data import Splits, load, split
from normlab.networks import build_network
from normlab.training import Recipe, Replica, train

RECIPE = Recipe(validation=0, epochs=1)
BATCH_SIZE, LR = 32, 0.01


class TutorialImages(Dataset[tuple[Tensor, int]]):
    """One image at a time, scaled when it is asked for."""

    def __init__(self, splits: Splits) -> None:
        self.images = splits.dataset.images[splits.indices["train"]].squeeze(1).numpy()
        self.labels = splits.dataset.labels[splits.indices["train"]].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index]).float().div(255), self.labels[index]


def network(arm: str, splits: Splits) -> torch.nn.Module:
    """Return a fresh network."""
    shape, classes = splits.dataset.image_shape, splits.dataset.classes
    return build_network(RECIPE.network, arm, 0, image_shape=shape, classes=classes)


def tutorial(arm: str, splits: Splits) -> None:
    """Train as tutorials write it: DataLoader, stock optimizer, `.item()` at every step."""
    model = network(arm, splits)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    criterion = torch.nn.CrossEntropyLoss()
    loader = DataLoader(TutorialImages(splits), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images.view(-1, 28 * 28)), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()


def eager(arm: str, splits: Splits) -> None:
    """Train with the data in memory and a fused optimizer, all threads."""
    model = network(arm, splits)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    images = splits.dataset.images[splits.indices["train"]].float().div_(255)
    labels = splits.dataset.labels[splits.indices["train"]]
    for batch in torch.randperm(len(labels)).split(BATCH_SIZE)[: len(labels) // BATCH_SIZE]:
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def engine(arm: str, splits: Splits) -> None:
    """Train as `normlab compare` does in each of its workers: on one thread."""
    quiet = Splits(splits.dataset, {**splits.indices, "test": splits.indices["test"][:1]})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in train(network(arm, splits), Replica(arm, LR, 0), RECIPE, quiet):
            pass
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each loop")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    splits = split(load("mnist"), validation=0)
    loops: dict[str, tuple[Callable[[str, Splits], None], str]] = {
        "tutorial, torch-batch": (tutorial, "torch-batch"),
        "eager, torch-batch": (eager, "torch-batch"),
        "normlab, torch-batch": (engine, "torch-batch"),
        "normlab, batch": (engine, "batch"),
        "normlab, plain": (engine, "plain"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.repeats):
        for name, (loop, arm) in loops.items():
            started = time.perf_counter()
            loop(arm, splits)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = medians["tutorial, torch-batch"]
    if options.json:
        document = {
            "seconds": seconds,
            "times_as_fast_as_the_tutorial": {n: slowest / m for n, m in medians.items()},
            "versions": {"normlab": normlab.__version__, "torch": torch.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        print(json.dumps(document, indent=2))
        return
    print(f"normlab {normlab.__version__}, torch {torch.__version__}, {platform.machine()}")
    print(
        f"{torch.get_num_threads()} threads; seconds an epoch, median of {options.repeats} (range)"
    )
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name:24} {median:6.2f} ({low:.2f}-{high:.2f})   {slowest / median:4.1f}×")


if __name__ == "__main__":
    main()
