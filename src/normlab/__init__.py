"""normlab: what a normalization layer is, whether it helps, and how sure one can be.

>>> import normlab
>>> normlab.Study(arms=["plain", "batch"], seeds=5).replicas[0]
Replica(arm='plain', lr=0.01, seed=0, weight_decay=0.0)
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from normlab.comparison import Comparison, compare
    from normlab.diagnosis import Diagnosis, diagnose
    from normlab.study import Study
    from normlab.surgery.convert import convert
    from normlab.surgery.fold import fold
    from normlab.surgery.freeze import freeze, unfreeze
    from normlab.surgery.recalibrate import adapt, recalibrate
    from normlab.training import Trainer

__version__ = _version("normlab")

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Comparison",
    "Diagnosis",
    "InputError",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LedgerError",
    "NormlabError",
    "Study",
    "SyncBatchNorm",
    "Trainer",
    "adapt",
    "batch_norm",
    "compare",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "recalibrate",
    "unfreeze",
]

# A network that only wants the layers should not wait for pydantic and rich, so these names are
# imported when they are first asked for. A home must not share the name of what lives in it: the
# import system would put the module in the name's place.
_HOMES = {
    "Comparison": "comparison",
    "Diagnosis": "diagnosis",
    "Study": "study",
    "Trainer": "training",
    "adapt": "surgery",
    "compare": "comparison",
    "convert": "surgery",
    "diagnose": "diagnosis",
    "fold": "surgery",
    "freeze": "surgery",
    "recalibrate": "surgery",
    "unfreeze": "surgery",
}

if not TYPE_CHECKING:  # A checker that saw this would take any misspelt name for one of ours.

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = getattr(_import_module(f"normlab.{_HOMES[name]}"), name)
            globals()[name] = value  # The next look-up finds it without coming here.
            return value
        if name in {*_HOMES.values(), "claims"}:
            return _import_module(f"normlab.{name}")
        raise AttributeError(f"module 'normlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
