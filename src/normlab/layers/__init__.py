"""Normalization layers: the mathematics, the modules around it, and their names."""

from normlab.layers.dropout import Dropout, draw_dropout_from
from normlab.layers.functional import Moments, batch_norm_backward, moments, normalize
from normlab.layers.fused import batch_norm
from normlab.layers.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from normlab.layers.norms import (
    NORM_LAYERS,
    NormConstructor,
    RMSNorm,
    norm_constructor,
    norm_names,
)

__all__ = [
    "NORM_LAYERS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Dropout",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "NormConstructor",
    "RMSNorm",
    "SyncBatchNorm",
    "batch_norm",
    "batch_norm_backward",
    "draw_dropout_from",
    "moments",
    "norm_constructor",
    "norm_names",
    "normalize",
]
