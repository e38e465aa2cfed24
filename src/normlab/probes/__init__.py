"""Probes: they measure inside a network, and never judge."""

from normlab.probes.histograms import Histogram, histogram, inside
from normlab.probes.outputs import outputs

__all__ = ["Histogram", "histogram", "inside", "outputs"]
