"""Batches as users have them: their labels, parts of them, and their samples in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.errors import InputError

__all__ = [
    "Mixed",
    "checked",
    "labels_of",
    "mixed",
    "numbered",
    "output_of",
    "part_of",
    "shapes_of",
    "tensors_of",
]

_LABELS = ("labels", "label", "y", "target", "targets")
_OUTPUTS = ("logits", "out", "output")


def checked(batches: Any, name: str = "batches") -> Iterable[Any]:
    """Return what is to be iterated over.

    Raises:
        InputError: It is nothing that yields batches.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            f"{name}: expected an iterable of batches, as a DataLoader is, got "
            f"{type(batches).__name__}; put a single batch in a list"
        )
    return batches


def numbered(batches: Iterable[Any], name: str = "batches") -> Iterator[tuple[int, Any]]:
    """Yield batches with their numbers, from 1.

    Raises:
        InputError: What yields them raised.

    >>> list(numbered("ab"))
    [(1, 'a'), (2, 'b')]
    """
    iterator, number = None, 0
    while True:
        number += 1
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # The user's code may raise anything.
            raise InputError(
                f"{name}: what yields them raised {type(error).__name__} for batch {number}: "
                f"{' '.join(str(error).split())}"
            ) from error
        yield number, batch


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch: the second of a tuple, or what a mapping calls so.

    >>> labels_of({"x": torch.ones(2, 3), "target": torch.tensor([0, 1])})
    tensor([0, 1])
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


def output_of(output: Any) -> Tensor | None:
    """Return the tensor that a model's output is, or the first in it."""
    if isinstance(output, Mapping):
        named = [output[key] for key in _OUTPUTS if key in output]
        output = (named or list(output.values()) or [None])[0]
    elif hasattr(output, "logits"):
        output = output.logits
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for each in batch.values():
            yield from tensors_of(each)
    elif isinstance(batch, (tuple, list)):
        for each in batch:
            yield from tensors_of(each)


def shapes_of(batch: Any) -> str:
    """Tell the shapes of a batch's tensors, for a message.

    >>> shapes_of((torch.ones(2, 3), torch.ones(2)))
    '(2, 3) and (2,)'
    """
    return " and ".join(str(tuple(each.shape)) for each in tensors_of(batch)) or "no tensors"


def part_of(batch: Any, size: int) -> Any:
    """Return the first samples of a batch; what is not one a sample stays whole.

    >>> part_of([torch.ones(4, 3), torch.arange(4)], 1)
    [tensor([[1., 1., 1.]]), tensor([0])]
    """
    samples = next((len(each) for each in tensors_of(batch) if each.ndim), 0)
    return _each(batch, lambda each: each[:size] if each.ndim and len(each) == samples else each)


class Mixed(NamedTuple):
    """Samples in another order.

    Attributes:
        batches: Of the sizes that they had.
        order: Which sample is where, int64, over all batches.
    """

    batches: list[Any]
    order: Tensor


def mixed(batches: Iterable[Any], generator: torch.Generator) -> Mixed | None:
    """Return the samples of all batches in random order.

    Returns:
        None where batches are not of tensors that have one row a sample, in the same structure.

    >>> again = mixed([torch.rand(3, 2), torch.rand(1, 2)], torch.Generator())
    >>> [len(each) for each in again.batches]
    [3, 1]
    """
    held = list(batches)
    columns = [list(tensors_of(batch)) for batch in held]
    sizes = [len(row[0]) if row and row[0].ndim else 0 for row in columns]
    for row, size in zip(columns, sizes, strict=True):
        alike = len(row) == len(columns[0]) and size > 0
        if not alike or any(not each.ndim or len(each) != size for each in row):
            return None
        if any(a.shape[1:] != b.shape[1:] for a, b in zip(row, columns[0], strict=True)):
            return None
    whole = [torch.cat(column) for column in zip(*columns, strict=True)]
    order = torch.randperm(sum(sizes), generator=generator)
    found = []
    for batch, index in zip(held, order.split(sizes), strict=True):
        parts = iter([column[index.to(column.device)] for column in whole])
        found.append(_each(batch, lambda _, parts=parts: next(parts)))
    return Mixed(found, order)


def _each(batch: Any, change: Any) -> Any:
    """Return a batch of the same structure with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _each(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_each(value, change) for value in batch)
    return batch
