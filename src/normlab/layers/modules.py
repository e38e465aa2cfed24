"""`BatchNorm1d`, `2d`, `3d` and their lazy and synchronized kin: the state, and nothing else."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from normlab.layers import sync
from normlab.layers.forward import Options, State, plain_forward, special_forward
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


# Symbolic tracing takes either call for one step, so that they may look at their tensors.
torch.fx.wrap("plain_forward")
torch.fx.wrap("special_forward")


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
            options = Options(
                self.ghost_size,
                self.finite_guard,
                self.num_batches_skipped,
                self.update_once,
                sync.group(self.process_group) if self._synchronized and self.training else None,
            )
            return special_forward(
                self._ranks, input, residual, mask, lengths, State(*state), options
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
