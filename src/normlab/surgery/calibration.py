"""γ and β of layers that took others' places, fit to what those put out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.errors import InputError
from normlab.surgery.models import copy_of
from normlab.surgery.standins import ChannelScale

__all__ = ["CoMoments", "calibrate_layers", "co_moments", "relative_error"]

_Run = Callable[[nn.Module, Any], Any]


class CoMoments(NamedTuple):
    """What is kept of pairs of values (x, y), per channel, in float64.

    Attributes:
        n: How many pairs a channel has.
        mean_x: x̄, shape (C,).
        mean_y: ȳ.
        square_x: Σ (x − x̄)².
        square_y: Σ (y − ȳ)².
        product: Σ (x − x̄)(y − ȳ).
    """

    n: int
    mean_x: Tensor
    mean_y: Tensor
    square_x: Tensor
    square_y: Tensor
    product: Tensor

    def merged(self, other: CoMoments) -> CoMoments:
        """Return those of both.

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances", 1979.
        """
        n = self.n + other.n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share, weight = other.n / n, self.n * other.n / n
        return CoMoments(
            n,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.square_x + other.square_x + dx * dx * weight,
            self.square_y + other.square_y + dy * dy * weight,
            self.product + other.product + dx * dy * weight,
        )


def co_moments(x: Tensor, y: Tensor) -> CoMoments:
    """Return the moments of pairs of values.

    Args:
        x: Shape (N, C, …).
        y: The same shape.

    >>> found = co_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]]))
    >>> found.square_x.item(), found.product.item()
    (2.0, 4.0)
    """
    x, y = (each.double().transpose(0, 1).flatten(1) for each in (x, y))
    mean_x, mean_y = x.mean(1), y.mean(1)
    x, y = x - mean_x[:, None], y - mean_y[:, None]
    sums = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    return CoMoments(x.shape[1], mean_x, mean_y, *sums)


@torch.no_grad()
def calibrate_layers(
    old: nn.Module, new: nn.Module, names: Sequence[str], run: _Run, batches: Sequence[Any]
) -> dict[str, float]:
    """Set γ and β of a model's layers, in order of their calls, to do what the old ones do.

    Each is fit to what its layer puts out in the old model, on what it gets in the new one, whose
    earlier layers are fit by then: so a layer also makes up for what those could not.

    Args:
        old: In eval mode; it is run.
        new: The same modules, but for the kind of the named ones. Their parameters and statistics
            are replaced by new tensors; those that they have now are not changed.
        names: Of the layers to fit.
        run: Runs a model on a batch.
        batches: To fit to.

    Returns:
        By name of each layer that is called, R²: the share of the variance of the old layer's
        output that the new layer's explains, over all channels.

    Raises:
        InputError: The layer is not called alike in both, or gets or puts out what is not finite.
    """
    trial, explained = copy_of(new).eval(), {}
    for name in _order(trial, names, run, batches[0]):
        before, after = old.get_submodule(name), trial.get_submodule(name)
        y_of, x_of = _bare(before), _unscaled(after)
        found: CoMoments | None = None
        for number, batch in enumerate(batches, 1):
            with _inputs([before]) as olds:
                run(old, batch)
            with _inputs([after]) as news:
                run(trial, batch)
            if [x.shape for _, x in olds] != [x.shape for _, x in news]:
                raise InputError(
                    f"{name}: it was called {len(olds)} times in the old model and {len(news)} "
                    "times in the new one, or with other shapes: expected the same of both"
                )
            for (_, x_old), (_, x_new) in zip(olds, news, strict=True):
                more = co_moments(x_of(x_new), y_of(x_old))
                if not all(each.isfinite().all() for each in more[1:]):
                    raise InputError(
                        f"{name or 'the model'}: batch {number} of calibrate has values there "
                        "that are not finite: leave such batches out"
                    )
                found = more if found is None else found.merged(more)
        if found is not None:
            explained[name] = _fit([after, new.get_submodule(name)], found, len(batches))
    return explained


def _fit(layers: Iterable[nn.Module], found: CoMoments, batches: int) -> float:
    """Set parameters and statistics of a layer and its copy; return R²."""
    for layer in layers:
        parts: Any = layer
        if _is_estimated(layer):
            tracked, count = parts.num_batches_tracked, found.n
            var = found.square_x / max(count - 1, 1)
            parts._buffers["running_mean"] = found.mean_x.to(parts.running_mean)
            parts._buffers["running_var"] = var.to(parts.running_var)
            if tracked is not None:
                parts._buffers["num_batches_tracked"] = torch.full_like(tracked, batches)
            scale = (var + parts.eps).rsqrt()
            x = found._replace(
                mean_x=torch.zeros_like(scale),
                square_x=found.square_x * scale**2,
                product=found.product * scale,
            )
        else:
            x = found
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        centered = bias is not None
        # Without a shift the line goes through the origin.
        above = x.product if centered else x.product + x.n * x.mean_x * x.mean_y
        below = x.square_x if centered else x.square_x + x.n * x.mean_x**2
        a = torch.where(below > 0, above / below, 0.0)
        a = torch.ones_like(a) if weight is None else a
        b = x.mean_y - a * x.mean_x if centered else torch.zeros_like(a)
        for each, value in (("weight", a), ("bias", b)):
            was = layer._parameters.get(each)
            if was is not None:
                layer._parameters[each] = nn.Parameter(value.to(was), was.requires_grad)
        left = x.square_y - 2 * a * x.product + a**2 * x.square_x
        left = left + x.n * (x.mean_y - a * x.mean_x - b) ** 2
    total = x.square_y.sum()
    least = 1e-24 * (x.n * x.mean_y**2).sum()  # Below it is rounding, of values that never vary.
    return float(1 - left.sum() / total) if total > least else float(left.sum() <= least)


def _is_estimated(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _bare(layer: Any) -> Any:
    """Return a layer that normalizes, scales and shifts alone, with the tensors of another."""
    bare = copy.copy(layer)
    for name, value in vars(nn.Module()).items():
        if "hooks" in name:
            vars(bare)[name] = copy.copy(value)
    if hasattr(layer, "activation"):
        vars(bare)["activation"] = None
    return bare


def _unscaled(layer: Any) -> Any:
    """Return what γ and β of a layer are applied to, as a function of its input.

    Of a batch norm that is the input itself, as if nothing were known of its statistics.
    """
    if isinstance(layer, ChannelScale) or _is_estimated(layer):
        return lambda x: x
    bare = _bare(layer)
    vars(bare)["_parameters"] = {
        name: None if each is None else torch.full_like(each, float(name == "weight"))
        for name, each in layer._parameters.items()
    }
    return bare


def _order(model: nn.Module, names: Sequence[str], run: _Run, batch: Any) -> list[str]:
    """Return the names of layers in order of their first calls."""
    layers = {model.get_submodule(name): name for name in names}
    with _inputs(layers) as inputs:
        run(model, batch)
    return list(dict.fromkeys(layers[layer] for layer, _ in inputs))


@contextmanager
def _inputs(layers: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Note what layers get, in order of their calls."""
    noted: list[tuple[nn.Module, Tensor]] = []

    def see(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted.append((layer, [*inputs, *named.values()][0].clone()))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def relative_error(
    old: nn.Module, new: nn.Module, run: _Run, batches: Iterable[Any]
) -> float | None:
    """Return ‖new − old‖ / ‖old‖ of all tensors that two models put out in eval mode, over batches.

    Args:
        old: It is run.
        new: A copy of it is run.
        run: Runs a model on a batch.
        batches: To run on.

    Returns:
        None if they put out no floating-point tensors, or others than one another.
    """
    trial, size, change = copy_of(new).eval(), 0.0, 0.0
    old.eval()
    for batch in batches:
        before, after = (list(_tensors(run(each, batch))) for each in (old, trial))
        if not before or [x.shape for x in before] != [x.shape for x in after]:
            return None
        for x, y in zip(before, after, strict=True):
            size += float(x.double().square().sum())
            change += float((y.double() - x.double()).square().sum())
    return math.sqrt(change / size) if size else (math.inf if change else 0.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
