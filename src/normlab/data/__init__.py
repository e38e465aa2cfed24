"""Real data, held once as bytes and scaled on use."""

from normlab.data.datasets import Dataset, dataset_names, load
from normlab.data.splits import SCALINGS, Splits, gather, scale, split

__all__ = ["SCALINGS", "Dataset", "Splits", "dataset_names", "gather", "load", "scale", "split"]
