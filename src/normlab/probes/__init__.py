"""Probes: they measure inside a network, and never judge."""

from normlab.probes.flow import Flow, flow
from normlab.probes.histograms import Histogram, histogram, inside
from normlab.probes.moments import Moments, norm_moments, pooled
from normlab.probes.outputs import outputs
from normlab.probes.registry import PROBES, Probe, read
from normlab.probes.units import Units

__all__ = [
    "PROBES",
    "Flow",
    "Histogram",
    "Moments",
    "Probe",
    "Units",
    "flow",
    "histogram",
    "inside",
    "norm_moments",
    "outputs",
    "pooled",
    "read",
]
