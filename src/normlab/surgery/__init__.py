"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import Report, convert, convert_with_report
from normlab.surgery.estimation import Estimate, Estimates, estimate
from normlab.surgery.exchange import exchange_norms
from normlab.surgery.freeze import FreezeReport, freeze, is_frozen, unfreeze
from normlab.surgery.recalibrate import (
    Drift,
    Recalibrated,
    RecalibrationReport,
    adapt,
    recalibrate,
)

__all__ = [
    "Drift",
    "Estimate",
    "Estimates",
    "FreezeReport",
    "Recalibrated",
    "RecalibrationReport",
    "Report",
    "adapt",
    "convert",
    "convert_with_report",
    "estimate",
    "exchange_norms",
    "freeze",
    "is_frozen",
    "recalibrate",
    "unfreeze",
]
