"""Studies: declare, run, keep, compare."""

from normlab.study.comparison import Comparison
from normlab.study.declaration import Study, bundled_studies, find_study
from normlab.study.inspection import layers_of
from normlab.study.published import PublishedFigure
from normlab.study.run import Watcher, run
from normlab.study.sensitivity import RateRange, widest_range
from normlab.study.verdicts import Metric, Verdict, judge

__all__ = [
    "Comparison",
    "Metric",
    "PublishedFigure",
    "RateRange",
    "Study",
    "Verdict",
    "Watcher",
    "bundled_studies",
    "find_study",
    "judge",
    "layers_of",
    "run",
    "widest_range",
]
