"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import Report, convert, convert_with_report
from normlab.surgery.exchange import exchange_norms
from normlab.surgery.fold import FoldReport, fold

__all__ = ["FoldReport", "Report", "convert", "convert_with_report", "exchange_norms", "fold"]
