"""The forward pass of a layer: which statistics, of what, and how the running ones move."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.layers import sync
from normlab.layers.functional import Moments, move_running
from normlab.layers.fused import batch_norm, check, normalize_by_batch

__all__ = ["Options", "State", "mask_of", "plain_forward", "special_forward"]


class State(NamedTuple):
    """What a layer owns and how it is set, apart from the options that only normlab has."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    track: bool
    momentum: float | None
    eps: float
    activation: str | None
    negative_slope: float


class Options(NamedTuple):
    """Those options, but for the activation."""

    ghost_size: int | None
    finite_guard: bool
    num_batches_skipped: Tensor | None
    update_once: bool
    process_group: Any


def plain_forward(
    ranks: tuple[int, ...],
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    track: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """Run the forward pass of a layer without a mask, by its own batch."""
    _check_rank(input, ranks)
    by_batch = training or (running_mean is None and running_var is None)
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if training and track:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if momentum is None:  # Cumulative average: every batch so far weighs the same.
                factor = num_batches_tracked.double().reciprocal()
    elif by_batch:
        running_mean = running_var = None
    return batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        by_batch,
        factor,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )


def special_forward(
    ranks: tuple[int, ...],
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    state: State,
    options: Options,
) -> Tensor:
    """Run the forward pass of a layer with options, a mask or a process group."""
    _check_rank(input, ranks)
    if lengths is not None:
        if mask is not None:
            raise RuntimeError("a mask and lengths say the same: pass one of them")
        mask = mask_of(lengths, input)
    if input.ndim >= 2 or input.numel():
        check(
            input,
            state.running_mean,
            state.running_var,
            state.weight,
            state.bias,
            state.activation,
            residual,
            mask,
        )
    if options.update_once and _repeats():
        # On copies, so that as much is saved for the backward pass as was the first time.
        running = ("running_mean", "running_var", "num_batches_tracked")
        copies = {name: getattr(state, name) for name in running}
        copies = {name: each if each is None else each.clone() for name, each in copies.items()}
        state = state._replace(**copies)
        options = options._replace(num_batches_skipped=None)
    ghosts = 1
    if options.ghost_size is not None and state.training:
        ghosts = max(1, -(-input.shape[0] // options.ghost_size))
    parts = [
        [None] * ghosts if each is None else each.tensor_split(ghosts)
        for each in (input, residual, mask)
    ]
    outputs = [_ghost_forward(x, r, m, state, options) for x, r, m in zip(*parts, strict=True)]
    return outputs[0] if ghosts == 1 else torch.cat(outputs)


def mask_of(lengths: Tensor, input: Tensor) -> Tensor:
    """Return where the values of an input of shape (N, C, …, L) are real, without channels."""
    if input.ndim < 3 or lengths.shape != input.shape[:1] or lengths.is_floating_point():
        raise RuntimeError(
            f"lengths should be integers of shape (N,), for an input of shape (N, C, …, L), not "
            f"{lengths.dtype} of shape {tuple(lengths.shape)} for an input of {tuple(input.shape)}"
        )
    positions = torch.arange(input.shape[-1], device=input.device)
    mask = positions < lengths.view(-1, *[1] * (input.ndim - 2))
    return mask.expand(input.shape[0], *input.shape[2:])


def _ghost_forward(
    input: Tensor, residual: Tensor | None, mask: Tensor | None, state: State, options: Options
) -> Tensor:
    training = state.training or (state.running_mean is None and state.running_var is None)
    synchronized = options.process_group is not None
    if not training or (mask is None and not options.finite_guard and not synchronized):
        return plain_forward((), input, residual, *state)
    follow = (state.activation, state.negative_slope, residual, mask)
    arguments = (input, state.weight, state.bias, state.eps, *follow)
    output, batch = (
        sync.normalize_by_group(*arguments, options.process_group)
        if synchronized
        else normalize_by_batch(*arguments)
    )
    if state.training and state.track:
        _move(batch, state, options)
    return output


def _check_rank(input: Tensor, ranks: tuple[int, ...]) -> None:
    if ranks and input.ndim not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(
            f"expected {expected} input (got {input.ndim}D input), and its shape is "
            f"{tuple(input.shape)}"
        )


def _move(batch: Moments, state: State, options: Options) -> None:
    """Move the running statistics by a batch, if it can be used."""
    enough = batch.n > 1  # A tensor, if the batch has a mask or is shared.
    usable = torch.as_tensor(enough, device=batch.mean.device)
    if options.finite_guard:
        finite = batch.mean.isfinite().all() & batch.var.isfinite().all()
        if options.num_batches_skipped is not None:
            options.num_batches_skipped.add_(~finite)
        usable = usable & finite
    momentum: float | Tensor = 0.0 if state.momentum is None else state.momentum
    if state.num_batches_tracked is not None:
        state.num_batches_tracked.add_(usable)
        if state.momentum is None:
            momentum = state.num_batches_tracked.clamp(min=1).double().reciprocal()
    move_running(state.running_mean, batch.mean, momentum, usable)
    move_running(state.running_var, batch.unbiased_var, momentum, usable)


def _repeats() -> bool:
    """Tell whether a checkpointed forward pass is being repeated, which happens inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
