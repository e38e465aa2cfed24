"""`BatchNorm1d`, `2d` and `3d`: the state around `functional.batch_norm`, and nothing else."""

from __future__ import annotations

from torch import Tensor, nn

from normlab.layers.functional import batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward pass. Arguments, parameters, buffers and state dicts are torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        moves = self.training and self.track_running_stats
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # Cumulative average: every batch so far weighs the same.
                momentum = self.num_batches_tracked.double().reciprocal()
        uses_running = moves or not self.training
        return batch_norm(
            input,
            self.running_mean if uses_running else None,
            self.running_var if uses_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L), a drop-in for `torch.nn.BatchNorm1d`.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: The weight of the new batch in the running statistics; None for the average of
            all batches so far.
        affine: Learn γ (`weight`) and β (`bias`).
        track_running_stats: Keep running statistics and use them in evaluation.

    >>> import torch
    >>> layer = BatchNorm1d(3)
    >>> layer(torch.arange(6.0).view(2, 3)).shape, layer.running_mean
    (torch.Size([2, 3]), tensor([0.1500, 0.2500, 0.3500]))
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W), a drop-in for `torch.nn.BatchNorm2d`.

    Arguments as for `BatchNorm1d`.

    >>> import torch
    >>> BatchNorm2d(3)(torch.rand(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W), a drop-in for `torch.nn.BatchNorm3d`.

    Arguments as for `BatchNorm1d`.

    >>> import torch
    >>> BatchNorm3d(3)(torch.rand(2, 3, 2, 4, 4)).shape
    torch.Size([2, 3, 2, 4, 4])
    """
