"""When a fleet is evaluated, and when it is probed."""

from __future__ import annotations

from typing import NamedTuple

from normlab.training.recipe import Recipe

__all__ = ["Schedule"]


class Schedule(NamedTuple):
    """The steps at which training stops to measure.

    Attributes:
        epoch: Steps in an epoch, each of which ends with an evaluation.
        evaluate_every: Steps between evaluations within an epoch; 0 for none.
        probe_every: Steps between probings, from step 0 on; 0 for none at all.

    >>> schedule, steps = Schedule(epoch=6, evaluate_every=4, probe_every=5), [0]
    >>> while steps[-1] < 12:
    ...     steps.append(schedule.next(steps[-1]))
    >>> [step for step in steps if schedule.evaluates(step)]
    [4, 6, 10, 12]
    >>> [step for step in steps if schedule.probes(step)]
    [0, 5, 10]
    """

    epoch: int
    evaluate_every: int
    probe_every: int

    @classmethod
    def of(cls, recipe: Recipe, epoch: int) -> Schedule:
        """Return what a recipe says, for epochs of so many steps."""
        probe_every = (recipe.probe_every or epoch) if recipe.probes else 0
        return cls(epoch, recipe.evaluate_every, probe_every)

    def next(self, step: int) -> int:
        """Return the first step after this one at which something is measured."""
        begun = step - step % self.epoch
        stops = [begun + self.epoch]
        if self.evaluate_every:
            stops.append(begun + _next(step - begun, self.evaluate_every))
        if self.probe_every:
            stops.append(_next(step, self.probe_every))
        return min(stops)

    def evaluates(self, step: int) -> bool:
        """Tell whether there is an evaluation after a step."""
        into_epoch = step % self.epoch
        within = bool(self.evaluate_every) and into_epoch % self.evaluate_every == 0
        return step > 0 and (into_epoch == 0 or within)

    def probes(self, step: int) -> bool:
        """Tell whether the probes read after a step; step 0 is before the first."""
        return bool(self.probe_every) and step % self.probe_every == 0


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every
