"""Running a model on batches, each a few times, and keeping what the doctor's signals look at."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from normlab.doctor.batches import (
    labels_of,
    numbered,
    output_of,
    part_of,
    shapes_of,
    tensors_of,
)
from normlab.doctor.observations import Answers, Layer, Observations
from normlab.errors import InputError
from normlab.probes import Moments, Units, flow, norm_moments
from normlab.streams import generators_kept
from normlab.surgery import is_frozen
from normlab.surgery.models import (
    Forward,
    batch_norms,
    buffers_kept,
    modes_kept,
    run_on,
)

__all__ = ["Loss", "Observer"]

Loss = Callable[[Any, Any], Tensor]
"""Takes a model's output and the labels; returns a scalar."""


class Observer:
    """Runs a copy of a model.

    Args:
        model: Its buffers, modes and generators are afterwards as they were; its parameters then
            require gradients.
        forward: Runs it on a batch.
        device: What tensors in a batch are moved to.
        loss: Of output and labels; cross-entropy by default, where labels are classes.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
        loss: Loss | None = None,
    ) -> None:
        self._model, self._forward, self._device, self._loss = model, forward, device, loss
        self._norms = batch_norms(model)
        held = {
            name: is_frozen(norm) or (model.training and not norm.training)
            for name, norm in self._norms.items()
        }
        self._switched = [self._norms[name] for name, frozen in held.items() if not frozen]
        # Before any mode or requires_grad is changed here.
        self._layers = [
            Layer(
                name,
                norm,
                held[name],
                norm.training,
                not any(each.requires_grad for each in norm.parameters(recurse=False)),
            )
            for name, norm in self._norms.items()
        ]

    def observe(self, batches: Iterable[Any]) -> Observations:
        """Run the model on each batch: as in evaluation, and normalizing by the batch.

        The first batch is also run in part, and backward; and where dropout stands before a batch
        norm, every batch with dropout.

        Raises:
            InputError: There is no batch, one is on another device, or the model raises.
        """
        seen = Observations(
            {layer.name: replace(layer, calls=[], dropped=[]) for layer in self._layers}
        )
        evaluated: list[NDArray[np.bool_]] = []
        by_batch: list[NDArray[np.bool_]] = []
        labels: list[NDArray[np.int64] | None] = []
        with self._prepared():
            for number, batch in numbered(batches):
                self._check_device(batch, number)
                classes = labels_of(batch)
                with torch.no_grad():
                    output = self._run(batch, number)
                seen.samples += _length(batch)
                right = _right(output, classes)
                labels.append(_classes(classes))
                if number == 1:
                    self._run_in_part(batch, output_of(output), seen)
                    seen.width = _width(output)
                    self._run_backward(batch, number, seen)
                output = self._by_batch(batch, number, seen)
                seen.batches = number
                again = _right(output, classes)
                if right is not None and again is not None:
                    evaluated.append(right)
                    by_batch.append(again)
        if not seen.batches:
            raise InputError(
                "expected at least one batch, got none: an iterator may have been used up before"
            )
        if evaluated:
            seen.answers = Answers(np.concatenate(evaluated), np.concatenate(by_batch))
        if all(each is not None for each in labels):
            seen.labels = [each for each in labels if each is not None]
        return seen

    def evaluate(self, batches: Iterable[Any], name: str = "batches") -> dict[str, list[Moments]]:
        """Return, by layer, the moments of each batch at the layer's first call, in evaluation.

        Those that are not finite are left out.
        """
        found: dict[str, list[Moments]] = {}
        with self._prepared(), torch.no_grad():
            for number, batch in numbered(batches, name):
                self._check_device(batch, number)
                with norm_moments(self._norms) as seen:
                    self._run(batch, number)
                for layer, calls in seen.items():
                    if _is_finite(calls[0]):
                        found.setdefault(layer, []).append(calls[0])
        if not found:
            raise InputError(f"{name}: expected at least one batch of finite values, got none")
        return found

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(modes_kept(self._model))
            stack.enter_context(buffers_kept(self._model))
            if "torch._dynamo" in sys.modules:  # Compiled code does not see new hooks.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            torch.manual_seed(0)  # Dropout is then the same at every diagnosis.
            # The flags alone: what else a class does in `train()` would not be undone by them.
            for module in self._model.modules():
                module.training = False
            yield

    def _run(self, batch: Any, number: int) -> Any:
        try:
            return run_on(self._model, batch, self._forward, self._device)
        except InputError:
            raise
        except Exception as error:  # The user's code may raise anything.
            raise InputError(
                f"batch {number}, of shapes {shapes_of(batch)}: the model raised "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    def _check_device(self, batch: Any, number: int) -> None:
        if self._forward is not None or self._device is not None:
            return
        homes = {each.device for each in (*self._model.parameters(), *self._model.buffers())}
        for tensor in tensors_of(batch):
            if homes and tensor.device not in homes and tensor.is_floating_point():
                home = next(iter(homes))
                raise InputError(
                    f"batch {number} is on {tensor.device} and the model on {home}: pass "
                    f"device={str(home)!r}"
                )

    @torch.no_grad()
    def _run_in_part(self, batch: Any, whole: Tensor | None, seen: Observations) -> None:
        samples = _length(batch)
        if whole is None or not whole.ndim or len(whole) != samples or samples < 2:
            return
        half = samples // 2
        try:
            part = output_of(self._run(part_of(batch, half), 1))
        except InputError as error:
            seen.part = f"a model that runs on half a batch ({error})"
            return
        if part is None or part.shape != whole[:half].shape or not whole.isfinite().all():
            seen.part = "outputs that are finite, one a sample"
            return
        seen.part = float((part.double() - whole[:half].double()).abs().max() / whole.abs().max())

    def _by_batch(self, batch: Any, number: int, seen: Observations) -> Any:
        """Run the model with its batch norms normalizing by the batch.

        Returns:
            Its output; None if a batch norm cannot do so, or if one gets what is not finite. The
            batch then counts for nothing else.
        """
        units = copy.deepcopy(seen.units)

        def see(place: str, kind: str, output: Tensor) -> None:
            seen.units.setdefault(place, Units(kind)).see(output)

        with (
            torch.no_grad(),
            self._normalizing_by_batch(),
            norm_moments(self._norms) as moments,
            flow(self._model, seen.flow, see) as end,
        ):
            try:
                output = self._run(batch, number)
                end(output)
            except InputError:
                if not _note_least(moments, seen):
                    raise
                return None
        _note_least(moments, seen)
        # In order of the calls: what is not finite spreads from the first.
        broken = next((n for n, calls in moments.items() if not all(map(_is_finite, calls))), None)
        if broken is not None:
            seen.broken[broken] = seen.broken.get(broken, 0) + 1
            seen.units = units
            return None
        for name, calls in moments.items():
            rows = seen.layers[name].calls
            rows += [[] for _ in range(len(calls) - len(rows))]
            for row, each in zip(rows, calls, strict=False):
                row += [each] if each.n else []
        after = {name: self._norms[name] for name in seen.flow.dropouts}
        if after:
            with (
                torch.no_grad(),
                self._normalizing_by_batch(dropout=True),
                norm_moments(after) as moments,
            ):
                self._run(batch, number)
            for name, calls in moments.items():
                seen.layers[name].dropped += calls[:1] if calls[0].n else []
        return output

    @contextmanager
    def _normalizing_by_batch(self, *, dropout: bool = False) -> Iterator[None]:
        with modes_kept(self._model), buffers_kept(self._model):
            for norm in self._switched:
                norm.training = True
            for module in self._model.modules():
                if dropout and isinstance(module, _DropoutNd):
                    module.training = True
            yield

    def _run_backward(self, batch: Any, number: int, seen: Observations) -> None:
        """Measure the gradient of the loss by what each layer gets."""
        labels = labels_of(batch)
        if labels is None:
            seen.gradient_unknown = "labels: batches of (input, labels)"
            return
        labels = labels if self._device is None else labels.to(self._device)
        squares: dict[str, float] = {}

        def measure(name: str) -> Callable[..., None]:
            def keep(gradient: Tensor) -> None:
                # Of several calls the first comes last in a backward pass, and stays.
                squares[name] = float(gradient.double().square().sum())

            def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                input = inputs[0] if inputs else named["input"]
                if input.requires_grad:
                    input.register_hook(keep)

            return before

        for parameter in self._model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        hooks = [
            norm.register_forward_pre_hook(measure(name), with_kwargs=True)
            for name, norm in self._norms.items()
        ]
        try:
            with torch.enable_grad(), self._normalizing_by_batch():
                output = self._run(batch, number)
                value = self._loss_of(output, labels)
                if value is None:
                    seen.gradient_unknown = "loss=, a function of output and labels"
                    return
                value.backward()
        except (InputError, RuntimeError) as error:
            seen.gradient_unknown = f"a loss with a gradient ({error})"
        finally:
            for hook in hooks:
                hook.remove()
            self._model.zero_grad(set_to_none=True)
        for name, square in squares.items():
            seen.layers[name].gradient = square

    def _loss_of(self, output: Any, labels: Tensor) -> Tensor | None:
        if self._loss is None:
            first = output_of(output)
            if first is None or _right(output, labels) is None:
                return None
            return F.cross_entropy(first, labels.to(first.device))
        try:
            return self._loss(output, labels)
        except Exception as error:  # The user's code may raise anything.
            raise InputError(
                f"loss raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error


def _is_finite(found: Moments) -> bool:
    return not found.n or bool((found.mean + found.var).isfinite().all())


def _note_least(moments: dict[str, list[Moments]], seen: Observations) -> bool:
    """Note the fewest values that a channel had; tell whether that was one or none."""
    fewest = float("inf")
    for name, calls in moments.items():
        least = min(each.n for each in calls)
        seen.layers[name].least = min(seen.layers[name].least, least)
        if not seen.layers[name].held:
            fewest = min(fewest, least)
    return fewest <= 1


def _length(batch: Any) -> int:
    return next((len(each) for each in tensors_of(batch) if each.ndim), 0)


def _width(output: Any) -> int | None:
    first = output_of(output)
    return first.shape[1] if first is not None and first.ndim == 2 else None


def _classes(labels: Tensor | None) -> NDArray[np.int64] | None:
    if labels is None or labels.ndim != 1 or labels.dtype in _FLOATS:
        return None
    return labels.detach().cpu().numpy().astype(np.int64)


def _right(output: Any, labels: Tensor | None) -> NDArray[np.bool_] | None:
    """Return which samples were classified right; None if this is no classification."""
    first = output_of(output)
    if first is None or labels is None or first.ndim != 2 or first.shape[1] < 2:
        return None
    if labels.shape != first.shape[:1] or labels.dtype in _FLOATS:
        return None
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < first.shape[1]:
        return None
    right = first.detach().argmax(1) == labels.to(first.device)
    return np.asarray(right.cpu().numpy(), dtype=np.bool_)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)
