"""What a study's networks are made of, and what was inside them, as frames."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normlab.data import load
from normlab.study.declaration import Study
from normlab.training import Replica, build
from normlab.training.networks import layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["histograms_frame", "layers_frame", "layers_of", "learned_frame", "probes_frame"]

_LAYER = ["arm", "layer", "kind", "shape", "parameters"]


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
    return pd.DataFrame(rows, columns=_LAYER)


def learned_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a ledger's rows of what norms learned as `Comparison.learned` has them."""
    import pandas as pd

    columns = [*Replica._fields, "layer", "name"]
    values = (
        (*(one[key] for key in columns), channel, value)
        for one in rows
        for channel, value in enumerate(json.loads(one["value"]))
    )
    return pd.DataFrame(values, columns=[*columns, "channel", "value"])


def histograms_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a ledger's rows of histograms as `Comparison.histograms` has them."""
    import pandas as pd

    columns = [*Replica._fields, "step", "epoch", "layer", "name", "low", "high", "counts"]
    frame = pd.DataFrame(list(rows), columns=columns)
    return frame.assign(counts=frame["counts"].map(json.loads))


def probes_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a ledger's rows of what probes read as `Comparison.probes` has them."""
    import pandas as pd

    columns = ["arm", "lr", "weight_decay", "seed", "step", "epoch", "probe", "layer", "name"]
    return pd.DataFrame(list(rows), columns=[*columns, "value"])


def layers_frame(
    arms: Sequence[str], rows: Sequence[Mapping[str, Any]], learned: pd.DataFrame
) -> pd.DataFrame:
    """Return a ledger's rows of layers as `Comparison.layers` has them.

    Args:
        arms: In the order of the study.
        rows: In the order of the pass.
        learned: Of the replicas that the arms are reported at; as `learned_frame` makes it.
    """
    import pandas as pd

    layers = [
        (arm, one["name"], one["kind"], tuple(json.loads(one["shape"])), one["parameters"])
        for arm in arms
        for one in rows
        if one["arm"] == arm
    ]
    frame = pd.DataFrame(layers, columns=_LAYER)
    for name in ("weight", "bias"):
        values = learned[learned["name"] == name].groupby(["arm", "layer"])["value"]
        ends = values.agg(["mean", "min", "max"])
        ends.columns = [f"{name}_{end}" for end in ("mean", "low", "high")]
        frame = frame.join(ends, on=["arm", "layer"])
    return frame
