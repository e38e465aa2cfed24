"""`BatchNorm1d`, `2d`, `3d` and their lazy and synchronized kin: the state, and nothing else."""

from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from normlab.layers import sync
from normlab.layers.functional import Moments, move_running
from normlab.layers.fused import batch_norm, check, normalize_by_batch
from normlab.layers.native import ACTIVATIONS

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
]


class _State(NamedTuple):
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


class _Options(NamedTuple):
    """Those options, but for the activation."""

    ghost_size: int | None
    finite_guard: bool
    num_batches_skipped: Tensor | None
    update_once: bool
    process_group: Any


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward pass and normlab's options. Parameters, buffers and state dicts are torch's."""

    _ranks: tuple[int, ...] = ()
    _synchronized = False
    process_group: Any = None
    name: str = ""
    num_batches_skipped: Tensor | None

    def _set_options(
        self,
        activation: str | None = None,
        negative_slope: float = 0.01,
        ghost_size: int | None = None,
        finite_guard: bool = False,
        update_once: bool = False,
        float32_statistics: bool = False,
    ) -> None:
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"unknown activation {activation!r}: known are {known}")
        if ghost_size is not None and ghost_size < 1:
            raise ValueError(f"ghost_size must be positive, but got {ghost_size}")
        self.activation = activation
        self.negative_slope = negative_slope
        self.ghost_size = ghost_size
        self.finite_guard = finite_guard
        self.update_once = update_once
        self.float32_statistics = float32_statistics
        if float32_statistics and not isinstance(self.running_mean, UninitializedBuffer):
            self._keep_float32(self.running_mean, self.running_var)
        # Not in the state dict, whose keys stay torch's.
        counter = torch.tensor(0) if finite_guard else None
        self.register_buffer("num_batches_skipped", counter, persistent=False)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalize, add `residual`, activate.

        Args:
            input: Shape (N, C, …).
            residual: Added before the activation; the shape of `input`.
            mask: True where a value is real, shape (N, …) without C: the statistics are taken over
                what is real, and every value is normalized by them.
            lengths: In place of `mask`: how many values along the last dimension are real, shape
                (N,).
        """
        buffers = self._buffers
        state = (
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
            self.weight,
            self.bias,
            self.training,
            self.track_running_stats,
            self.momentum,
            self.eps,
            self.activation,
            self.negative_slope,
        )
        special = (
            self.ghost_size is not None
            or self.finite_guard
            or self.update_once
            or self._synchronized
            or mask is not None
            or lengths is not None
        )
        try:
            if not special:
                return plain_forward(self._ranks, input, residual, *state)
            options = _Options(
                self.ghost_size,
                self.finite_guard,
                self.num_batches_skipped,
                self.update_once,
                sync.group(self.process_group) if self._synchronized and self.training else None,
            )
            return special_forward(
                self._ranks, input, residual, mask, lengths, _State(*state), options
            )
        except (ValueError, RuntimeError) as error:
            # Subclasses carry messages of their own, and some are not errors at all.
            if type(error) not in (ValueError, RuntimeError, NotImplementedError):
                raise
            name = f"{type(self).__name__}({self.num_features})"
            raise type(error)(f"{error}; in {name}{self.name and f' {self.name!r}'}") from error

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        if self.float32_statistics:
            self._keep_float32(*before)
        return self

    def _keep_float32(self, *values: Tensor | None) -> None:
        """Hold running statistics of half precision in float32, with the values they had."""
        for name, value in zip(("running_mean", "running_var"), values, strict=True):
            now = getattr(self, name)
            if now is not None and now.dtype in (torch.float16, torch.bfloat16):
                assert value is not None
                setattr(self, name, value.to(now.device, torch.float32))

    def extra_repr(self) -> str:
        options = {
            "activation": (self.activation, None),
            "negative_slope": (self.negative_slope, 0.01),
            "ghost_size": (self.ghost_size, None),
            "finite_guard": (self.finite_guard, False),
            "update_once": (self.update_once, False),
            "float32_statistics": (self.float32_statistics, False),
        }
        given = "".join(
            f", {name}={value!r}" for name, (value, default) in options.items() if value != default
        )
        return super().extra_repr() + given


# Symbolic tracing takes either call for one step, so that they may look at their tensors.
@torch.fx.wrap
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


@torch.fx.wrap
def special_forward(
    ranks: tuple[int, ...],
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    state: _State,
    options: _Options,
) -> Tensor:
    """Run the forward pass of a layer with options, a mask or a process group."""
    _check_rank(input, ranks)
    if lengths is not None:
        if mask is not None:
            raise RuntimeError("a mask and lengths say the same: pass one of them")
        mask = _mask_of(lengths, input)
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


def _mask_of(lengths: Tensor, input: Tensor) -> Tensor:
    if input.ndim < 3 or lengths.shape != input.shape[:1] or lengths.is_floating_point():
        raise RuntimeError(
            f"lengths should be integers of shape (N,), for an input of shape (N, C, …, L), not "
            f"{lengths.dtype} of shape {tuple(lengths.shape)} for an input of {tuple(input.shape)}"
        )
    positions = torch.arange(input.shape[-1], device=input.device)
    mask = positions < lengths.view(-1, *[1] * (input.ndim - 2))
    return mask.expand(input.shape[0], *input.shape[2:])


def _ghost_forward(
    input: Tensor, residual: Tensor | None, mask: Tensor | None, state: _State, options: _Options
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


def _move(batch: Moments, state: _State, options: _Options) -> None:
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


class _Eager(_BatchNorm):
    """A layer that knows its number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        ghost_size: int | None = None,
        finite_guard: bool = False,
        update_once: bool = False,
        float32_statistics: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._set_options(
            activation, negative_slope, ghost_size, finite_guard, update_once, float32_statistics
        )


class _Lazy(_BatchNorm):
    """A layer that learns its number of channels from the first batch."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        # Here comes torch's own lazy layer, which has no number of channels to be told.
        lazy: Any = super().__init__
        lazy(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._set_options(**options)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Learn the number of channels from a batch; what comes along with it tells no more."""
        initialize: Any = super().initialize_parameters  # type: ignore[misc]
        initialize(input)
        if self.float32_statistics:
            self._keep_float32(self.running_mean, self.running_var)


class BatchNorm1d(_Eager, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L), a drop-in for `torch.nn.BatchNorm1d`.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: The weight of the new batch in the running statistics; None for the average of
            all batches so far.
        affine: Learn γ (`weight`) and β (`bias`).
        track_running_stats: Keep running statistics and use them in evaluation.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: Learn β, if `affine`.
        activation: What follows, in the same pass over memory: "relu", "leaky_relu", "sigmoid" or
            "silu".
        negative_slope: Of "leaky_relu".
        ghost_size: In training, normalize by the statistics of parts of the batch, of this many
            samples at most and of sizes as equal as can be, as if they came one after another.
        finite_guard: Leave the running statistics alone where the batch's are NaN or infinite, and
            count such batches in `num_batches_skipped`.
        update_once: Do not move the running statistics again when activation checkpointing repeats
            the forward pass.
        float32_statistics: Keep the running statistics in float32 under `half()` and `bfloat16()`.

    >>> import torch
    >>> layer = BatchNorm1d(3)
    >>> layer(torch.arange(6.0).view(2, 3)).shape, layer.running_mean
    (torch.Size([2, 3]), tensor([0.1500, 0.2500, 0.3500]))
    """

    _ranks = (2, 3)


class BatchNorm2d(_Eager, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W), a drop-in for `torch.nn.BatchNorm2d`.

    Arguments as for `BatchNorm1d`.

    >>> import torch
    >>> BatchNorm2d(3, activation="relu")(torch.rand(2, 3, 4, 4)).min()
    tensor(0., grad_fn=<MinBackward1>)
    """

    _ranks = (4,)


class BatchNorm3d(_Eager, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W), a drop-in for `torch.nn.BatchNorm3d`.

    Arguments as for `BatchNorm1d`.

    >>> import torch
    >>> BatchNorm3d(3)(torch.rand(2, 3, 2, 4, 4)).shape
    torch.Size([2, 3, 2, 4, 4])
    """

    _ranks = (5,)


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes its number of channels from the first batch.

    Arguments as for `BatchNorm1d`, but without `num_features`.

    >>> import torch
    >>> layer = LazyBatchNorm1d()
    >>> _ = layer(torch.rand(4, 3))
    >>> layer
    BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    cls_to_become = BatchNorm1d
    _ranks = (2, 3)


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes its number of channels from the first batch.

    Arguments as for `BatchNorm1d`, but without `num_features`.
    """

    cls_to_become = BatchNorm2d
    _ranks = (4,)


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes its number of channels from the first batch.

    Arguments as for `BatchNorm1d`, but without `num_features`.
    """

    cls_to_become = BatchNorm3d
    _ranks = (5,)


class SyncBatchNorm(_BatchNorm):
    """Batch normalization by the batch of all ranks of a process group, on any backend.

    Takes the arguments and the state dict of `torch.nn.SyncBatchNorm`, which refuses tensors on a
    CPU. It is no instance of that class, for `DistributedDataParallel` refuses those there too. In
    evaluation, and where no process group is initialized, it is plain batch normalization.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: The weight of the new batch in the running statistics; None for the average of
            all batches so far.
        affine: Learn γ (`weight`) and β (`bias`).
        track_running_stats: Keep running statistics and use them in evaluation.
        process_group: Whose batch counts; None for all ranks.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: Learn β, if `affine`.
        options: Those of `BatchNorm1d` that follow `bias`.

    Shape: (N, C, …) to the same.
    """

    _synchronized = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        if options.get("ghost_size") is not None:
            raise ValueError(
                "ghost_size parts a batch, and SyncBatchNorm joins those of all ranks: choose one"
            )
        self.process_group = process_group
        self._set_options(**options)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Put a `SyncBatchNorm` in the place of every batch norm layer, sharing its tensors.

        As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: the module is changed in place, unless
        it is itself a batch norm layer.
        """
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
                bias=module.bias is not None,
                **options,
            )
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                setattr(converted, name, tensor)
            converted.training = module.training
            converted.name = getattr(module, "name", "")
        for name, child in module.named_children():
            setattr(converted, name, cls.convert_sync_batchnorm(child, process_group))
        return converted


_OPTIONS = (
    "activation",
    "negative_slope",
    "ghost_size",
    "finite_guard",
    "update_once",
    "float32_statistics",
)
