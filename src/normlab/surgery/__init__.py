"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import convert
from normlab.surgery.estimation import Estimate, Estimates, estimate
from normlab.surgery.exchange import exchange_norms
from normlab.surgery.fold import FoldReport, fold
from normlab.surgery.freeze import FreezeReport, freeze, is_frozen, unfreeze
from normlab.surgery.recalibrate import (
    Drift,
    Recalibrated,
    RecalibrationReport,
    adapt,
    recalibrate,
)
from normlab.surgery.report import ConversionReport

__all__ = [
    "ConversionReport",
    "Drift",
    "Estimate",
    "Estimates",
    "FoldReport",
    "FreezeReport",
    "Recalibrated",
    "RecalibrationReport",
    "adapt",
    "convert",
    "estimate",
    "exchange_norms",
    "fold",
    "freeze",
    "is_frozen",
    "recalibrate",
    "unfreeze",
]
