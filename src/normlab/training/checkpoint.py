"""A fleet between two epochs, as a file that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normlab.errors import NormlabError
from normlab.files import replace
from normlab.probes import Histogram
from normlab.training.recipe import FleetEvent, Measurement, Outcome, Reading, Replica

__all__ = ["load", "save"]

_EVENTS = "events"


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    events: Sequence[FleetEvent],
) -> None:
    """Write a checkpoint.

    Args:
        path: The file to replace.
        tensors: All that the next steps depend on.
        facts: What else there is to know, as JSON takes it.
        events: What was measured so far.

    Raises:
        NormlabError: It cannot be written; the one before is still there.
    """
    from safetensors.torch import save

    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = json.dumps([_to_json(event) for event in events]).encode()
    # Not among the facts, for a header of safetensors has an end.
    kept[_EVENTS] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    try:
        replace(path, save(kept, {"fleet": json.dumps(facts)}))
    except OSError as error:
        raise NormlabError(
            f"{path} cannot be written ({error.strerror}); what was measured before is kept: "
            "make room, and run the same command again"
        ) from None


def load(
    path: Path, tensors: Mapping[str, Tensor], *, engine: str
) -> tuple[dict[str, Any], list[FleetEvent]]:
    """Read a checkpoint into tensors; return its facts and events.

    Args:
        path: What `save` wrote.
        tensors: Filled in place.
        engine: What the facts must say under that name.

    Raises:
        NormlabError: The file is damaged, or was written by something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["fleet"])
            found = {name: file.get_tensor(name) for name in tensors}
            told = file.get_tensor(_EVENTS).numpy().tobytes()
        if facts["engine"] != engine:
            raise ValueError(f"it was made by another engine, {facts['engine']}")
        events = [_from_json(event) for event in json.loads(told)]
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise NormlabError(
            f"{path} is no checkpoint of this run ({error}): remove it to train anew"
        ) from None
    return facts, events


def _to_json(event: FleetEvent) -> dict[str, Any]:
    if isinstance(event, Outcome):
        return {"outcome": event}
    if isinstance(event, Reading):
        return {"reading": event}
    values = [[split, metric, value] for (split, metric), value in event.values.items()]
    return {"measurement": event[:3], "values": values, "histograms": event.histograms}


def _from_json(event: dict[str, Any]) -> FleetEvent:
    if "outcome" in event:
        replica, *rest = event["outcome"]
        return Outcome(Replica(*replica), *rest)
    if "reading" in event:
        replica, *rest = event["reading"]
        return Reading(Replica(*replica), *rest)
    replica, step, epoch = event["measurement"]
    values = {(split, metric): value for split, metric, value in event["values"]}
    histograms = {
        layer: {name: Histogram(*each) for name, each in seen.items()}
        for layer, seen in event["histograms"].items()
    }
    return Measurement(Replica(*replica), step, epoch, values, histograms)
