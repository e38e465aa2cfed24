"""Surgery on networks that exist: it works on a copy, and keeps everything or names what not."""

from normlab.surgery.convert import Report, convert, convert_with_report

__all__ = ["Report", "convert", "convert_with_report"]
