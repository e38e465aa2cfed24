"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import convert
from normlab.surgery.exchange import exchange_norms
from normlab.surgery.report import Report

__all__ = ["Report", "convert", "exchange_norms"]
