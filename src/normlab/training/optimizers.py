"""Optimizers of many replicas: torch's fused kernels, without the bookkeeping around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normlab.training.recipe import Recipe, Setting

__all__ = ["BETAS", "EPS", "Columns", "Optimizer", "make"]

BETAS, EPS = (0.9, 0.999), 1e-8  # Of Adam, as in torch.


def make(recipe: Recipe, parameters: Sequence[Tensor], settings: Sequence[Setting]) -> Optimizer:
    """Return the optimizer of a recipe.

    Args:
        recipe: Names it, with its momentum.
        parameters: Each of shape (R, …); moved in place.
        settings: Of the R replicas.
    """
    return (_SGD if recipe.optimizer == "sgd" else _Adam)(recipe, parameters, settings)


class Columns(NamedTuple):
    """What a fused kernel takes: lists with a tensor for each parameter."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]


class Optimizer(ABC):
    """Moves stacked parameters along their gradients.

    Its state is stacked along the replicas as the parameters are, and lies in memory as they do.
    """

    def __init__(
        self, recipe: Recipe, parameters: Sequence[Tensor], settings: Sequence[Setting]
    ) -> None:
        self.recipe, self.settings = recipe, settings
        moments = self._moments()
        self.steps = torch.zeros(len(settings), device=parameters[0].device)
        self.moments = [[torch.zeros_like(p) for p in parameters] for _ in range(moments)]
        self.state = [self.steps, *(each for moment in self.moments for each in moment)]
        self._each = [
            Columns(
                [each[r] for each in parameters],
                [],
                [[each[r] for each in moment] for moment in self.moments],
                [self.steps[r]] * len(parameters),
            )
            for r in range(len(settings))
        ]
        # Replicas of one setting in one call, but tensor by tensor: a sweep over whole stacks would
        # round a replica's values by its place among the others.
        self._groups = []
        for setting in dict.fromkeys(settings):
            members = [r for r, own in enumerate(settings) if own == setting]
            joined = [self._each[r] for r in members]
            columns = Columns(
                [each for columns in joined for each in columns.parameters],
                [],
                [
                    [each for columns in joined for each in columns.moments[i]]
                    for i in range(moments)
                ],
                [each for columns in joined for each in columns.steps],
            )
            self._groups.append((members, setting, columns))

    def columns(self, replica: int) -> Columns:
        """Return a replica's parameters, moments and count of steps, without gradients."""
        return self._each[replica]

    def step(self, replica: int, gradients: Sequence[Tensor]) -> None:
        """Move one replica; gradients without a first axis for it."""
        self.steps[replica].add_(1)
        columns = self._each[replica]._replace(gradients=list(gradients))
        self._move(columns, self.settings[replica])

    def step_all(self, gradients: Sequence[Tensor]) -> None:
        """Move all of them."""
        self.steps += 1
        by_replica = [each.unbind() for each in gradients]
        for members, setting, columns in self._groups:
            joined = [each[r] for r in members for each in by_replica]
            self._move(columns._replace(gradients=joined), setting)

    @abstractmethod
    def _moments(self) -> int:
        """Return how many tensors are kept for each parameter."""

    @abstractmethod
    def _move(self, columns: Columns, setting: Setting) -> None:
        """Let torch's kernel do it."""


class _SGD(Optimizer):
    def _moments(self) -> int:
        return 1 if self.recipe.momentum else 0

    def _move(self, columns: Columns, setting: Setting) -> None:
        torch._fused_sgd_(
            columns.parameters,
            columns.gradients,
            columns.moments[0] if columns.moments else [],
            weight_decay=setting.weight_decay,
            momentum=self.recipe.momentum,
            lr=setting.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # Without dampening that is a step from a velocity of zero.
        )


class _Adam(Optimizer):
    def _moments(self) -> int:
        return 2

    def _move(self, columns: Columns, setting: Setting) -> None:
        torch._fused_adam_(
            columns.parameters,
            columns.gradients,
            columns.moments[0],
            columns.moments[1],
            [],
            columns.steps,
            lr=setting.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=setting.weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
