"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import Report, convert
from normlab.surgery.exchange import exchange_norms

__all__ = ["Report", "convert", "exchange_norms"]
