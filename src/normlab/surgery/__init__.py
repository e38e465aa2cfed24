"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import Report, convert, convert_with_report
from normlab.surgery.exchange import exchange_norms
from normlab.surgery.freeze import FreezeReport, freeze, is_frozen, unfreeze

__all__ = [
    "FreezeReport",
    "Report",
    "convert",
    "convert_with_report",
    "exchange_norms",
    "freeze",
    "is_frozen",
    "unfreeze",
]
