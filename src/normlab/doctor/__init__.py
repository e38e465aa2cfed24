"""The doctor: what probes measure in a user's model, turned into findings."""

from normlab.doctor.diagnose import SIGNALS, diagnose
from normlab.doctor.diagnosis import Diagnosis, LayerNumbers, UnitNumbers
from normlab.doctor.finding import WEIGHTS, Finding
from normlab.doctor.mend import Fixed, mend
from normlab.doctor.thresholds import THRESHOLDS

__all__ = [
    "SIGNALS",
    "THRESHOLDS",
    "WEIGHTS",
    "Diagnosis",
    "Finding",
    "Fixed",
    "LayerNumbers",
    "UnitNumbers",
    "diagnose",
    "mend",
]
