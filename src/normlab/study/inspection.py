"""What a study's networks are made of, before any is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normlab.data import load
from normlab.study.declaration import Study
from normlab.training import build
from normlab.training.networks import layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["layers_of"]


def layers_of(study: Study) -> pd.DataFrame:
    """Return the layers of each arm's network.

    Returns:
        Columns `arm`, `layer`, `kind`, `shape` (of what it makes of one sample), `parameters`.

    Raises:
        InputError: A network cannot be built.
        FetchError: The data, which say the shapes, cannot be had.

    >>> layers_of(Study(arms=["plain"]))["kind"].tolist()
    ['Flatten', 'Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
    """
    import pandas as pd

    dataset = load(study.dataset)
    rows = [
        (arm, *layer)
        for arm in study.arms
        for layer in layers(build(study, arm, 0, dataset), dataset.image_shape)
    ]
    return pd.DataFrame(rows, columns=["arm", "layer", "kind", "shape", "parameters"])
