"""Real data, held once as bytes and scaled on use."""

from normlab.data.datasets import (
    Dataset,
    check_dataset,
    dataset_names,
    fetch,
    load,
    published_facts,
    verify,
    where,
)
from normlab.data.description import Description, contact_sheet, describe
from normlab.data.splits import SCALINGS, Splits, gather, scale, split

__all__ = [
    "SCALINGS",
    "Dataset",
    "Description",
    "Splits",
    "check_dataset",
    "contact_sheet",
    "dataset_names",
    "describe",
    "fetch",
    "gather",
    "load",
    "published_facts",
    "scale",
    "split",
    "verify",
    "where",
]
