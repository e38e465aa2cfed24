"""What batch norm layers get over many batches: counts, means and variances, in float64.

Moments are merged as Chan, Golub and LeVeque do ("Algorithms for computing the sample variance",
1983): every value weighs the same, however the values are parted into batches, and a mean that is
large against the deviation costs no digits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from normlab.errors import InputError
from normlab.layers import modules, sync
from normlab.layers.forward import mask_of
from normlab.streams import generators_kept
from normlab.surgery.models import Forward, buffers_kept, modes_kept, run_on

__all__ = ["FEWEST_BATCHES", "Estimate", "Estimates", "estimate"]

FEWEST_BATCHES = 8
"""Batches before a spread among batch means is believed."""

_CHUNK = 1 << 18  # Values at a time in float64, so that they stay in a cache.


@dataclass(frozen=True)
class Estimate:
    """What a layer got.

    Attributes:
        count: Values per channel.
        mean: Of each channel, shape (C,), float64, on the CPU.
        var: Biased variance, likewise.
        standard_error: Of the mean, from the spread of batch means, likewise; infinite for a
            single batch. It takes batches for independent draws.
        batches: That were used.
        samples: The sum of the first dimensions of the layer's inputs in these batches.
    """

    count: int
    mean: Tensor
    var: Tensor
    standard_error: Tensor
    batches: int
    samples: int

    @property
    def unbiased_var(self) -> Tensor:
        """The variance that running statistics hold; NaN for a single value."""
        return self.var * (self.count / (self.count - 1) if self.count > 1 else math.nan)


class Estimates(NamedTuple):
    """What layers got, and how the passes went.

    Attributes:
        layers: By name; those that got no value are left out.
        skipped: Batches that were not finite, of layers with a `finite_guard`, where there are any.
        batches: That the model was run on, by all ranks together.
        batches_here: That it was run on by this rank.
        settled: Whether the tolerance was met, on every rank, before the batches were asked for
            more.
        again: Whether the batches can be gone through again, on every rank.
    """

    layers: dict[str, Estimate]
    skipped: dict[str, int]
    batches: int
    batches_here: int
    settled: bool
    again: bool


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, _BatchNorm],
    *,
    by_batch: bool = True,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    dropout: bool = False,
    tolerance: float | None = None,
    process_group: Any = None,
) -> Estimates:
    """Run a model on batches, without gradients, and return the moments of what layers get.

    A layer that is called more than once pools its inputs. With a mask or lengths, of normlab's
    layers, only what is real counts. The model, its buffers and modes, the global generators and
    torch's settings are afterwards as they were.

    Args:
        model: To run; all of it is in eval mode, but for the layers.
        batches: As `normlab.surgery.models.run_on` takes them.
        layers: Layers of the model, by name.
        by_batch: Let the layers normalize each batch by its own statistics, as in training; else
            by their running ones.
        forward: Runs the model on a batch.
        device: What tensors in a batch are moved to.
        dropout: Let dropout layers be in training mode.
        tolerance: Stop where the standard error of every channel's mean is at most this much of the
            channel's standard deviation, after 8 batches or more.
        process_group: Over whose ranks the moments are merged, at the end, by one exchange. An
            error on one rank is an error on all.

    Raises:
        InputError: There is no batch; a layer gets what is not finite, has another number of
            channels, or has a single value per channel, which cannot be normalized by itself; a
            module is lazy and saw no batch yet.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> batches = [torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[3.0], [3.0]])]
    >>> found = estimate(model, batches, {"0": model[0]})
    >>> found.layers["0"].mean.item(), found.layers["0"].count
    (3.0, 5)
    """
    try:
        run = _Run(model, layers, by_batch, forward, device, dropout, tolerance)
        mine = run.through(batches)
    except Exception as error:
        if process_group is not None:
            _exchange(f"{type(error).__name__}: {error}", process_group)
        raise
    passes = [mine] if process_group is None else _exchange(mine, process_group)
    sums: dict[str, _Sums] = {}
    for each in passes:
        for name, some in each.sums.items():
            sums[name] = sums[name].merge(some) if name in sums else some
    total = sum(each.batches for each in passes)
    if total == 0:
        raise InputError(
            "expected at least one batch, got none: an iterator may have been used up before"
        )
    return Estimates(
        {name: each.estimate() for name, each in sums.items() if each.batches},
        {name: each.skipped for name, each in sums.items() if each.skipped},
        total,
        mine.batches,
        all(each.settled for each in passes),
        all(each.again for each in passes),
    )


class _Moments(NamedTuple):
    """Weight, weighted mean, and weighted sum of squared deviations from it, of each channel."""

    weight: float
    mean: Tensor
    squares: Tensor

    def merge(self, other: _Moments) -> _Moments:
        weight = self.weight + other.weight
        share = other.weight / weight
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta.square() * (self.weight * share)
        return _Moments(weight, self.mean + delta * share, squares)

    def around(self, center: Tensor) -> Tensor:
        """Return the weighted sum of squared deviations from another center."""
        return self.squares + self.weight * (self.mean - center).square()


class _Sums(NamedTuple):
    """What a layer got, in a form that merges.

    Attributes:
        values: Each value with weight 1.
        means: The mean of each batch, with the square of its number of values for a weight.
        batches: That were used.
        samples: In them.
        skipped: Batches that were not finite.
    """

    values: _Moments | None
    means: _Moments | None
    batches: int
    samples: int
    skipped: int

    def merge(self, other: _Sums) -> _Sums:
        return _Sums(
            _merged(self.values, other.values),
            _merged(self.means, other.means),
            self.batches + other.batches,
            self.samples + other.samples,
            self.skipped + other.skipped,
        )

    def as_batch(self) -> _Sums:
        """Return the sums over a batch, of what was seen in its single calls."""
        if self.skipped or self.values is None:
            return _Sums(None, None, 0, 0, 1)
        count, mean, _ = self.values
        means = _Moments(count**2, mean, torch.zeros_like(mean))
        return _Sums(self.values, means, 1, self.samples, 0)

    def estimate(self) -> Estimate:
        assert self.values is not None
        assert self.means is not None
        count, mean, squares = self.values
        error = torch.full_like(mean, math.inf)
        if self.batches > 1:
            spread = self.means.around(mean) * (self.batches / (self.batches - 1))
            error = spread.sqrt() / count
        return Estimate(round(count), mean, squares / count, error, self.batches, self.samples)


def _merged(one: _Moments | None, other: _Moments | None) -> _Moments | None:
    return one.merge(other) if one and other else one or other


class _Pass(NamedTuple):
    """What one rank saw."""

    sums: dict[str, _Sums]
    batches: int
    settled: bool
    again: bool


class _Run:
    """A pass over batches, with hooks on the layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _BatchNorm],
        by_batch: bool,
        forward: Forward | None,
        device: torch.device | str | None,
        dropout: bool,
        tolerance: float | None,
    ) -> None:
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise InputError(f"expected a positive tolerance or None, got {tolerance}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise InputError(f"{name} has no shape yet: run the model on a batch once")
        self.model, self.layers, self.by_batch = model, layers, by_batch
        self.forward, self.device, self.dropout = forward, device, dropout
        self.tolerance = tolerance
        self.sums: dict[str, _Sums] = {}
        self.number = 0  # Of the batch.
        self.seen: dict[str, _Sums] = {}  # In it.

    def through(self, batches: Iterable[Any]) -> _Pass:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise InputError(
                f"expected an iterable of batches, such as a DataLoader, got a "
                f"{type(batches).__name__}: put a single batch in a list"
            )
        # A data-parallel wrapper would send buffers on each forward pass, and ranks may have
        # unequal numbers of them.
        model = self.model
        while isinstance(model, DistributedDataParallel):
            model = model.module
        settled = False
        with self._prepared(), torch.no_grad():
            for batch in batches:
                self.number, self.seen = self.number + 1, {}
                run_on(model, batch, self.forward, self.device)
                for name, seen in self.seen.items():
                    whole = seen.as_batch()
                    self.sums[name] = self.sums[name].merge(whole) if name in self.sums else whole
                settled = self._settled()
                if settled:
                    break
        return _Pass(self.sums, self.number, settled, not isinstance(batches, Iterator))

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(modes_kept(self.model))
            stack.enter_context(buffers_kept(self.model))
            if "torch._dynamo" in sys.modules:  # Compiled code does not see new hooks.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            dropouts = nn.modules.dropout._DropoutNd
            # The flags alone: what else a class does in `train()` would not be undone by them.
            for module in self.model.modules():
                module.training = self.dropout and isinstance(module, dropouts)
            for name, layer in self.layers.items():
                layer.training = self.by_batch
                hook = layer.register_forward_pre_hook(
                    functools.partial(self._see, name), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield

    def _see(self, name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the moments of an input; what is no input at all is left to the layer to refuse."""
        input = next(iter([*args, *kwargs.values()]), None)
        if not isinstance(input, Tensor) or input.ndim < 2:
            return
        input, where = input.detach(), f"{name or 'the model'}: batch {self.number}"
        shape, mean = tuple(input.shape), layer.running_mean
        channels = layer.num_features if mean is None else mean.numel()
        if shape[1] != channels:
            raise InputError(f"{where} has shape {shape} there, expected (N, {channels}, …)")
        mask = _mask(layer, input, kwargs)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != (shape[0], *shape[2:]):
                return
            input = input.movedim(1, -1)[mask]
        elif layer.training and input.numel() == channels and not _shares(layer):
            raise InputError(
                f"{where} has one value per channel there, shape {shape}, which cannot be "
                "normalized by itself: use larger batches, or drop_last=True"
            )
        if not input.numel():
            return
        moments = _moments(input)
        finite = bool((moments.mean + moments.squares).isfinite().all())
        if not finite and not getattr(layer, "finite_guard", False):
            raise InputError(
                f"{where} has values there that are not finite: leave such batches out, or give "
                "the layer a finite_guard"
            )
        seen = _Sums(moments, None, 1, shape[0], int(not finite))
        self.seen[name] = self.seen[name].merge(seen) if name in self.seen else seen

    def _settled(self) -> bool:
        """Tell whether the means of all layers that were called are known well enough."""
        if self.tolerance is None or not self.sums:
            return False
        if min(each.batches for each in self.sums.values()) < FEWEST_BATCHES:
            return False
        found = [each.estimate() for each in self.sums.values()]
        return all(
            bool((each.standard_error <= self.tolerance * each.var.sqrt()).all()) for each in found
        )


def _mask(layer: nn.Module, input: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the mask that a layer of normlab's gets; that of another may mean something else."""
    if not isinstance(layer, modules._BatchNorm):
        return None
    mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
    return mask if lengths is None else mask_of(lengths, input)


def _shares(layer: nn.Module) -> bool:
    """Tell whether a layer normalizes by the batches of other ranks too."""
    if not isinstance(layer, (nn.SyncBatchNorm, modules.SyncBatchNorm)):
        return False
    return sync.group(layer.process_group) is not None


def _moments(input: Tensor) -> _Moments:
    """Return the moments of each channel of (N, C, …), which is not empty."""
    over = [dim for dim in range(input.ndim) if dim != 1]
    parts = min(input.shape[0], -(-input.numel() // _CHUNK))

    def of(part: Tensor) -> _Moments:
        part = part.double()
        mean = part.mean(over, keepdim=True)
        squares = (part - mean).square_().sum(over)
        return _Moments(part.numel() / part.shape[1], mean.flatten().cpu(), squares.cpu())

    return functools.reduce(_Moments.merge, map(of, input.tensor_split(parts)))


def _exchange(mine: _Pass | str, process_group: Any) -> list[_Pass]:
    """Give every rank what each saw; a text is the error of a rank."""
    if dist.get_rank(process_group) < 0:
        raise InputError("expected a process_group that this rank is part of")
    everybody: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everybody, mine, group=process_group)
    for rank, each in enumerate(everybody):
        if isinstance(each, str) and not isinstance(mine, str):
            raise InputError(f"rank {rank} of the process group failed: {each}")
    return everybody
