"""Reports: a comparison in words, tables, charts and one HTML page. Nothing here trains."""

from normlab.report.charts import CHARTS, chart
from normlab.report.live import Live
from normlab.report.page import write
from normlab.report.table import TerminalTable, html_table, text_table
from normlab.report.wording import headline, remarks, sentence

__all__ = [
    "CHARTS",
    "Live",
    "TerminalTable",
    "chart",
    "headline",
    "html_table",
    "remarks",
    "sentence",
    "text_table",
    "write",
]
