"""Reports of comparisons and diagnoses: words, tables, charts, pages, logs. Nothing here trains."""

from normlab.report.charts import CHARTS, chart
from normlab.report.doctor import diagnosis_chart, findings_html, write_diagnosis
from normlab.report.export import FORMATS, export
from normlab.report.inside import inside_charts
from normlab.report.layers import LayersTable
from normlab.report.live import Live
from normlab.report.logs import Log, Logs
from normlab.report.mlflow import Mlflow
from normlab.report.page import page_html, write
from normlab.report.runs import runs_html, write_runs
from normlab.report.table import TerminalTable, html_table, text_table
from normlab.report.tensorboard import TensorBoard
from normlab.report.watching import Watch, watch
from normlab.report.wording import headline, remarks, sentence

__all__ = [
    "CHARTS",
    "FORMATS",
    "LayersTable",
    "Live",
    "Log",
    "Logs",
    "Mlflow",
    "TensorBoard",
    "TerminalTable",
    "Watch",
    "chart",
    "diagnosis_chart",
    "export",
    "findings_html",
    "headline",
    "html_table",
    "inside_charts",
    "page_html",
    "remarks",
    "runs_html",
    "sentence",
    "text_table",
    "watch",
    "write",
    "write_diagnosis",
    "write_runs",
]
