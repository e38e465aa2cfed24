"""Measured differences between a model and what was made of it, on one example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normlab.errors import InputError
from normlab.streams import generators_kept
from normlab.surgery.watching import tensors_in

__all__ = ["TOLERANCES", "Certificate", "compare", "floats_of", "run_example"]

TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}
"""The largest relative error that is allowed by default, by the least precise dtype at work."""


@dataclass(frozen=True)
class Certificate:
    """How far a model's output is from the original's, both in evaluation, on the example.

    Attributes:
        largest: The largest absolute difference, over all floating-point tensors of the output.
        mean: The mean absolute difference.
        scale: The largest absolute value of the original's output.
        tolerance: What `relative_largest` was allowed to be.
    """

    largest: float
    mean: float
    scale: float
    tolerance: float

    @property
    def relative_largest(self) -> float:
        """`largest / scale`."""
        return _ratio(self.largest, self.scale)

    @property
    def relative_mean(self) -> float:
        """`mean / scale`."""
        return _ratio(self.mean, self.scale)

    def __str__(self) -> str:
        return (
            f"largest error {self.largest:.2g}, mean {self.mean:.2g}, where the output's largest "
            f"value is {self.scale:.3g}: {self.relative_largest:.2g} and {self.relative_mean:.2g} "
            f"of it; {self.tolerance:.2g} allowed"
        )


def run_example(model: nn.Module, example: Any) -> Any:
    """Run a model on a copy of an example, and leave the global random generators as they were.

    Args:
        model: To run, in the mode it has.
        example: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        InputError: It is none of these, or the model raises.

    >>> run_example(nn.Bilinear(1, 1, 1), (torch.ones(2, 1), torch.ones(2, 1))).shape
    torch.Size([2, 1])
    """
    copied = tree_map_only(Tensor, lambda each: each.detach().clone(), example)
    with generators_kept(), torch.no_grad():
        try:
            if isinstance(example, Mapping):
                return model(**copied)
            if isinstance(example, tuple):
                return model(*copied)
            if isinstance(example, Tensor):
                return model(copied)
        except Exception as error:  # The user's code may raise anything.
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} {t.device}" for t in tensors_in(copied))
            raise InputError(
                f"the model cannot be run on the example ({shapes or 'without tensors'}): "
                f"{type(error).__name__}: {error}; pass an example that it takes in evaluation"
            ) from error
    raise InputError(
        f"the example is a {type(example).__name__}: expected a tensor, a tuple of positional "
        "arguments, or a mapping of keyword arguments"
    )


def floats_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output that hold real or complex numbers, apart from the model.

    Raises:
        InputError: There is none.
    """
    found = [each for each in tensors_in(output) if each.is_floating_point() or each.is_complex()]
    if not found:
        kinds = sorted({str(each.dtype) for each in tensors_in(output)})
        raise InputError(
            f"the model returns a {type(output).__name__} "
            f"{'of ' + ', '.join(kinds) if kinds else 'without tensors'}: expected floating-point "
            "tensors, alone or in tuples, lists, mappings or dataclasses, to measure the error on; "
            "fold the part of the model that returns them"
        )
    return [each.detach().clone() for each in found]


def compare(
    original: list[Tensor], changed: list[Tensor], tolerance: float | None, model: nn.Module
) -> Certificate:
    """Return the certificate of one list of outputs against another.

    Where the original has NaN or an infinity, the same is no error, and anything else infinitely
    large.

    Args:
        original: The original's output.
        changed: The same tensors of the changed model's.
        tolerance: Of the relative error; None for the default of the least precise dtype among the
            output and the model's parameters.
        model: Whose parameters are looked at.

    Raises:
        InputError: The outputs are of other shapes, or the original's has no finite value.

    >>> compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])], None, nn.Identity())
    Certificate(largest=0.5, mean=0.25, scale=2.0, tolerance=0.0001)
    """
    if [each.shape for each in original] != [each.shape for each in changed]:
        raise InputError("the model's output has another structure or shape after the change")
    if tolerance is None:
        dtypes = {each.dtype.to_real() for each in (*original, *model.parameters())}
        tolerance = max(TOLERANCES.get(each, 0.0) for each in dtypes)
    errors, sizes = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]
    for one, other in zip(map(_flat, original), map(_flat, changed), strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        error = (one - other).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        errors.append(error.masked_fill(same, 0))
        sizes.append(one[one.isfinite()].abs())
    error, size = torch.cat(errors), torch.cat(sizes)
    if size.numel() == 1:  # The zero that it begins with.
        raise InputError(
            "the model's output on the example has no finite value to measure the error on: pass "
            "another example"
        )
    return Certificate(float(error.max()), float(error.mean()), float(size.max()), tolerance)


def _flat(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().to("cpu", torch.float64).flatten()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("inf") * part if part else 0.0
