"""normlab: what a normalization layer is, whether it helps, and how sure one can be.

>>> import normlab
>>> normlab.Study(arms=["plain", "batch"], seeds=5).replicas[0]
Replica(arm='plain', lr=0.01, seed=0)
"""

from importlib.metadata import version as _version

from normlab.compare import Comparison, compare
from normlab.errors import InputError, LedgerError, NormlabError
from normlab.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
    batch_norm,
)
from normlab.study import Study
from normlab.surgery import convert

__version__ = _version("normlab")

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Comparison",
    "InputError",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LedgerError",
    "NormlabError",
    "Study",
    "SyncBatchNorm",
    "batch_norm",
    "compare",
    "convert",
]
