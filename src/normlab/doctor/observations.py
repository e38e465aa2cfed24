"""What is observed of a model before anything is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.probes import Flow, Moments, Units, pooled

__all__ = ["Answers", "Layer", "Observations"]


@dataclass
class Layer:
    """One batch norm layer.

    Attributes:
        name: Its qualified name.
        module: Of the copy that was measured, with the buffers that the user's has.
        held: Whether its statistics are frozen: it never normalizes by a batch in training.
        training: The mode that the user's model has it in.
        frozen_parameters: Whether none of its own requires gradients in the user's model.
        calls: By call within a forward pass, the moments of each batch, all batch norms normalizing
            by the batch.
        dropped: Of its first call, the same with dropout on; empty if there is none before it.
        least: The fewest values that a channel of it had in a batch.
        gradient: ‖δ‖², of the loss by the input of its first call; None if not measured.
    """

    name: str
    module: _BatchNorm
    held: bool
    training: bool
    frozen_parameters: bool = False
    calls: list[list[Moments]] = field(default_factory=list)
    dropped: list[Moments] = field(default_factory=list)
    least: float = math.inf
    gradient: float | None = None

    @cached_property
    def precise(self) -> Moments | None:
        """The moments of all that it got, where they are finite; None if it was not called."""
        parts = [each for call in self.calls for each in call]
        return pooled(parts) if parts else None

    @cached_property
    def batches(self) -> int:
        """How many batches it got at its first call."""
        return len(self.calls[0]) if self.calls else 0

    @cached_property
    def worth(self) -> float:
        """m_eff: how many independent values a batch is worth, Var(x) / Var(μb).

        The harmonic mean over channels that vary; NaN where none does, and from fewer than two
        batches.

        The variance of the batch means is taken without bias. A batch is worth no more than the
        values it has.
        """
        rows = self.calls[0] if self.calls else []
        if len(rows) < 2:
            return math.nan
        whole = pooled(rows)
        spread = torch.stack([each.mean for each in rows]).var(0)
        kept = whole.var > 0
        share = float((spread[kept] / whole.var[kept]).mean())
        most = float(np.median([each.n for each in rows]))
        return most if share == 0 else min(1 / share, most)

    @property
    def tracked(self) -> int:
        """How many batches moved the running statistics; 0 where they are not counted."""
        counter = self.module.num_batches_tracked
        return 0 if counter is None else int(counter)

    @property
    def running(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance in float64; None if it keeps none."""
        mean, var = self.module.running_mean, self.module.running_var
        return None if mean is None or var is None else (mean.double().cpu(), var.double().cpu())


@dataclass(frozen=True)
class Answers:
    """Which samples a classifier got right: as in evaluation, and normalizing by the batch."""

    evaluated: NDArray[np.bool_]
    by_batch: NDArray[np.bool_]


@dataclass
class Observations:
    """All that the signals look at.

    Attributes:
        layers: Batch norm layers, by name, in the order of the model.
        units: Activations, by place.
        flow: What stands around the layers.
        batches: How many were seen.
        samples: How many were in them: the length of a batch's first tensor.
        answers: None without labels of classes.
        labels: By batch, if they are classes.
        width: Classes that the output has, if it is of shape (N, C).
        part: Largest |f(part of a batch) − f(batch)|, relative to the largest |f|; or why not.
        decay: By parameter, the weight decay that the optimizer has for it; None without one.
        steps: Of the optimizer so far, as told.
        given: Right answers with the samples in the order of the batches, where that was by class
            and everything else was measured on the samples mixed.
        order_unknown: Why that was not measured.
        evaluated: By layer, the moments of each batch in evaluation; None without a reference.
        reference: The same of batches of the training domain.
        broken: By layer, the batches in which it was the first to get what is not finite.
        reached: How the user's code reaches the model that the names are of: `model`, or
            `model.module` of a data-parallel wrapper.
        options: What `recalibrate` and its like need to run it as it was run here.
        world_size: Of the process group, 1 if there is none.
        gradient_unknown: Why gradients were not measured.
    """

    layers: dict[str, Layer]
    units: dict[str, Units] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)
    batches: int = 0
    samples: int = 0
    answers: Answers | None = None
    labels: list[NDArray[np.int64]] | None = None
    width: int | None = None
    part: float | str = "a batch of two samples or more"
    decay: dict[str, float] | None = None
    steps: int | None = None
    given: NDArray[np.bool_] | None = None
    order_unknown: str = ""
    evaluated: dict[str, list[Moments]] | None = None
    reference: dict[str, list[Moments]] | None = None
    broken: dict[str, int] = field(default_factory=dict)
    reached: str = "model"
    options: str = ""
    world_size: int = 1
    gradient_unknown: str = ""

    def at(self, layer: Layer) -> str:
        """Return the expression by which the user's code reaches a layer."""
        return f"{self.reached}.get_submodule({layer.name!r})"

    @property
    def recalibrate(self) -> str:
        """The line that estimates running statistics anew."""
        return f"model, report = normlab.recalibrate(model, batches{self.options})"

    @cached_property
    def trained(self) -> bool:
        """Whether anything says that the model was trained."""
        layers = self.layers.values()
        return (
            bool(self.steps)
            or any(each.tracked for each in layers)
            or any(_moved(each.module) for each in layers)
        )


def _moved(layer: _BatchNorm) -> bool:
    """Tell whether γ or β or the running statistics are not what layers begin with."""
    starts = [(layer.running_mean, 0), (layer.running_var, 1), (layer.bias, 0)]
    if any(each is not None and bool((each != value).any()) for each, value in starts):
        return True
    return layer.weight is not None and bool((layer.weight != layer.weight.flatten()[0]).any())
