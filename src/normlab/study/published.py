"""What a text printed, set beside what a study measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from normlab.errors import InputError
from normlab.statistics import prediction_interval

__all__ = ["PublishedFigure", "beside"]


class PublishedFigure(BaseModel):
    """A figure that a text printed, and where a run measures the same.

    >>> PublishedFigure(arm="batch", metric="accuracy", epoch=10, value=0.97).place
    'batch, test accuracy after epoch 10'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arm: str = Field(description="Which arm's.")
    against: str | None = Field(None, description="The figure is the difference from this arm.")
    split: Literal["batches", "train", "validation", "test"] = Field(
        "test",
        description="What it was measured on; batches: the epoch's batches so far, as they were "
        "trained on.",
    )
    metric: Literal["accuracy", "loss"] = Field(description="accuracy (a share) or loss (nats).")
    epoch: int = Field(ge=0, description="Epochs finished.")
    steps: int = Field(0, ge=0, description="And steps into the next one.")
    value: float = Field(description="What was printed.")
    to: float | None = Field(None, description="The end of the range, if one was printed.")

    @model_validator(mode="after")
    def _is_a_range(self) -> PublishedFigure:
        if self.metric == "accuracy" and not -1 <= self.value <= 1:
            raise InputError(f"published accuracy {self.value}: expected a share, as in 0.97")
        if self.to is not None and self.to < self.value:
            raise InputError(f"published from {self.value} to {self.to}: the larger one comes last")
        return self

    @property
    def place(self) -> str:
        """Where it is from, for people."""
        arms = f"{self.arm} against {self.against}" if self.against else self.arm
        if self.split == "batches":
            which = f"the first {self.steps} batches" if self.steps else "the batches"
            epoch = self.epoch + (self.steps > 0)
            return f"{arms}, {self.metric} on {which} of epoch {epoch}, as trained on"
        when = f"after epoch {self.epoch}"
        if self.steps:
            when = f"at step {self.steps} of epoch {self.epoch + 1}"
        return f"{arms}, {self.split} {self.metric} {when}"

    @property
    def printed(self) -> str:
        """The figure as the text has it: accuracies in percent, differences of them in points."""
        ends = [self.value] if self.to is None else [self.value, self.to]
        return " to ".join(map(self.show, ends))

    def show(self, value: float) -> str:
        """Return a value as this figure is shown."""
        if self.metric == "loss":
            return f"{value:+.3f}" if self.against else f"{value:.3f}"
        return f"{value * 100:+.2f} points" if self.against else f"{value * 100:.2f}%"


def beside(
    figures: tuple[PublishedFigure, ...],
    measured: Mapping[tuple[str, str, str, int, int], Mapping[int, float]],
    confidence: float,
) -> list[dict[str, Any]]:
    """Set published figures beside measured ones.

    Args:
        figures: The published ones.
        measured: (arm, split, metric, epochs finished, steps into the next) to each seed's value.
        confidence: Of the interval in which one more seed's value would lie.

    Returns:
        A dict for each figure: its fields and `place`; `n`, `mean` and `sd` over the seeds;
        `difference` of the mean from what was printed, 0 inside a printed range; `low` and `high`,
        the interval of one more seed; `within`, whether the figure is one that such a seed could
        give. None where there are too few seeds to say.
    """
    rows = []
    for figure in figures:
        values = _values(figure, measured)
        row = {**figure.model_dump(), "place": figure.place, "n": len(values)}
        mean = float(values.mean()) if len(values) else None
        end = figure.value if figure.to is None else figure.to
        row |= {
            "mean": mean,
            "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            "difference": None if mean is None else mean - float(np.clip(mean, figure.value, end)),
            "low": None,
            "high": None,
            "within": None,
        }
        if len(values) > 1:
            low, high = prediction_interval(values, confidence)
            row |= {"low": low, "high": high, "within": low <= end and figure.value <= high}
        rows.append(row)
    return rows


def _values(
    figure: PublishedFigure, measured: Mapping[tuple[str, str, str, int, int], Mapping[int, float]]
) -> NDArray[np.float64]:
    where = (figure.split, figure.metric, figure.epoch, figure.steps)
    ours = measured.get((figure.arm, *where), {})
    if figure.against is None:
        return np.array(list(ours.values()))
    theirs = measured.get((figure.against, *where), {})
    return np.array([value - theirs[seed] for seed, value in ours.items() if seed in theirs])
