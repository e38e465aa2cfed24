"""The fixes that change nothing a model has learned, done and measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from normlab.doctor.batches import checked
from normlab.doctor.diagnose import Asked, examine
from normlab.doctor.diagnosis import Diagnosis
from normlab.errors import InputError
from normlab.surgery import recalibrate
from normlab.surgery.models import batch_norms, copy_of

__all__ = ["Fixed", "mend"]

_BY_RECALIBRATION = {
    "momentum against steps",
    "momentum convention",
    "never updated",
    "not finite",
    "stale statistics",
    "train/eval gap",
}


@dataclass(frozen=True)
class Fixed:
    """What was mended.

    Attributes:
        model: A copy, mended.
        before: The diagnosis of the model.
        after: The diagnosis of the copy, by the same batches.
        done: What was changed, a line each.
        left: What could not be done, and why.
    """

    model: nn.Module
    before: Diagnosis
    after: Diagnosis
    done: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"before: {self.before.summary}"]
        lines += [f"  done: {each}" for each in self.done]
        lines += [f"  left: {each}" for each in self.left]
        return "\n".join([*lines, f"after: {self.after.summary}"])


def mend(before: Diagnosis, batches: Iterable[Any] | None = None) -> Fixed:
    """Mend a copy of what was diagnosed, and diagnose it again.

    Momentum that is meant the other way round is turned, and running statistics that are stale,
    never updated or not finite are estimated anew. Weights, γ and β stay as they are.

    Args:
        before: A diagnosis.
        batches: To estimate by and to diagnose by; those of the diagnosis if none are given.

    Raises:
        InputError: The batches cannot be gone through again.
    """
    asked: Asked = before.asked
    if batches is not None:
        asked = replace(asked, batches=checked(batches), mixed=None)
    if isinstance(asked.batches, Iterator):
        raise InputError("the batches were an iterator, and are used up: fixed(batches)")
    model = copy_of(asked.model)
    norms = batch_norms(model)
    done, left = [], []
    for finding in before.findings:
        if finding.signal == "momentum convention":
            norm = norms[finding.layer]
            assert norm.momentum is not None
            norm.momentum = round(1 - norm.momentum, 12) if norm.momentum < 1 else 0.1
            done.append(f"{finding.layer or 'the model'}: momentum {norm.momentum:g}")
    heavy = [each for each in before.findings if each.weight != "information"]
    if any(each.signal in _BY_RECALIBRATION for each in heavy):
        try:
            _, report = recalibrate(
                model,
                asked.mixed or asked.batches,
                forward=asked.forward,
                device=asked.device,
                inplace=True,
            )
        except InputError as error:
            left.append(f"recalibrate: {error}")
        else:
            done.append(f"{len(report.layers)} batch norms recalibrated")
            left += [f"{name or 'the model'}: {why}" for name, why in report.left.items()]
    after = type(before)(**vars(examine(replace(asked, model=model))))
    return Fixed(model, before, after, tuple(done), tuple(left))
