"""Whether a fleet's pass does what its module does."""

from __future__ import annotations

import torch

from normlab.training import program
from normlab.training.fleet import Fleet

__all__ = ["agrees_with_the_module"]


def agrees_with_the_module(fleet: Fleet, steps: int = 3) -> bool:
    """Tell whether the pass returns what the module itself does, on some batches in turn."""
    size = fleet.recipe.batch_size
    module = fleet.make_pass(size, "eager", "float32")
    if fleet.precision == "float32":
        return _agree(fleet, fleet.pass_for(size), module, steps)
    # Rounded factors hide a trace that does something else, so that is looked at without.
    trace, rounded = (
        fleet.make_pass(size, "traced", precision) for precision in ("float32", fleet.precision)
    )
    return _agree(fleet, trace, module, steps) and _agree(
        fleet, fleet.pass_for(size), rounded, steps, tolerance=1e-2
    )


def _agree(
    fleet: Fleet, run: program.Pass, other: program.Pass, steps: int, tolerance: float = 1e-3
) -> bool:
    size = fleet.recipe.batch_size
    mine, its = ([each.clone() for each in fleet.example(size)[2:]] for _ in range(2))
    images, labels = fleet.splits.dataset.images, fleet.splits.dataset.labels
    train = fleet.splits.indices["train"]
    for step in range(steps):
        place = torch.arange(step * size, (step + 1) * size, device=train.device)
        batch = train[place % len(train)]
        mine[-1], its[-1] = batch.expand_as(mine[-1]), batch.expand_as(its[-1])
        *found, _ = run([images, labels, *mine])  # Hits can hang on roundings.
        *expected, _ = other([images, labels, *its])
        if not program.are_close([*found, *mine], [*expected, *its], tolerance):
            return False
    return True
