"""Reports: a comparison in words, tables, charts and one HTML page. Nothing here trains."""

from normlab.report.charts import CHARTS, chart
from normlab.report.live import Live
from normlab.report.page import html, write
from normlab.report.table import html_table, terminal_table, text_table
from normlab.report.wording import headline, sentence

__all__ = [
    "CHARTS",
    "Live",
    "chart",
    "headline",
    "html",
    "html_table",
    "sentence",
    "terminal_table",
    "text_table",
    "write",
]
