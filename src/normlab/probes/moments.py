"""What batch norm layers get: each call's mean and variance, and those of many batches together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.layers.forward import mask_of
from normlab.layers.functional import moments

__all__ = ["Moments", "norm_moments", "pooled"]


class Moments(NamedTuple):
    """Mean and biased variance of each channel, shape (C,), float64, and values in a channel."""

    mean: Tensor
    var: Tensor
    n: float

    @property
    def unbiased_var(self) -> Tensor:
        """The variance that running statistics hold; NaN or infinite for a single value."""
        return self.var * (self.n / (self.n - 1))


@contextmanager
def norm_moments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Moments]]]:
    """Measure what layers get, as long as the context lasts.

    Args:
        layers: Batch norm layers by name; what is masked in normlab's layers is not counted.

    Yields:
        By name, the moments of each call so far, on the CPU; none of a layer that is not called.

    >>> network = nn.Sequential(nn.Identity(), nn.BatchNorm1d(1))
    >>> with norm_moments({"1": network[1]}) as seen:
    ...     y = network(torch.tensor([[1.0], [3.0]]))
    >>> seen["1"]
    [Moments(mean=tensor([2.], dtype=torch.float64), var=tensor([1.], dtype=torch.float64), n=2.0)]
    """
    seen: dict[str, list[Moments]] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(_measuring(name, seen), with_kwargs=True)
            hooks.enter_context(hook)
        yield seen


def _measuring(name: str, seen: dict[str, list[Moments]]) -> Callable[..., None]:
    def measure(_: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any]) -> None:
        input = inputs[0] if inputs else named["input"]
        with torch.no_grad():
            found = moments(input, _mask(input, named))
        mean, var = (each.double().cpu() for each in found[:2])
        seen.setdefault(name, []).append(Moments(mean, var, float(found.n)))

    return measure


def _mask(input: Tensor, named: Mapping[str, Any]) -> Tensor | None:
    """Return what `mask=` or `lengths=` of normlab's layers say, to broadcast against the input."""
    mask, lengths = named.get("mask"), named.get("lengths")
    if lengths is not None:
        mask = mask_of(lengths, input)
    return None if mask is None else mask.unsqueeze(1)


def pooled(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all values together; each part weighs as many values as it has.

    The variance is that within the parts and that of their means, both sums of squares, so that no
    digits are lost: `σ² = Σ nᵢ (σᵢ² + (μᵢ − μ)²) / n`.

    Args:
        parts: Of one layer.

    Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.

    >>> one = Moments(torch.tensor([0.0]), torch.tensor([0.0]), 1.0)
    >>> pooled([one, Moments(torch.tensor([3.0]), torch.tensor([0.0]), 2.0)])
    Moments(mean=tensor([2.]), var=tensor([2.]), n=3.0)
    """
    means = torch.stack([part.mean for part in parts])
    variances = torch.stack([part.var for part in parts])
    counts = torch.tensor([part.n for part in parts], dtype=means.dtype).view(-1, 1)
    n = float(counts.sum())
    mean = (means * counts).sum(0) / n
    return Moments(mean, ((variances + (means - mean).square()) * counts).sum(0) / n, n)
