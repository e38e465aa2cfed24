"""The command `normlab doctor`: diagnose a model that a function of the user's returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

import normlab
from normlab import data, imports
from normlab.cli_data import Json
from normlab.errors import InputError
from normlab.streams import stream

__all__ = ["Doctor"]

_STYLES = {"error": "bold red", "warning": "bold yellow", "information": "bold"}


@dataclass(frozen=True)
class Doctor:
    """Diagnose the batch norms of a model; exit with 1 if a finding is an error."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="MODULE:FUNCTION", help="Returns a model, or a model and its batches."
        ),
    ]
    data: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help="What --dataset of compare takes, or module:function that returns batches.",
            help_behavior_hint="(the batches that come with the model)",
        ),
    ] = None
    samples: Annotated[
        int, tyro.conf.arg(metavar="N", help="Of a data set, from its training images.")
    ] = 1024
    batch_size: Annotated[int, tyro.conf.arg(metavar="N", help="Of a data set.")] = 128
    scaling: Annotated[
        str, tyro.conf.arg(metavar="RANGE", help="Of a data set's pixels: 0..1 or -1..1.")
    ] = "0..1"
    checkpoint: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE.safetensors", help="A state dict to load first.", help_behavior_hint=""
        ),
    ] = None
    report: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE.html", help="Write a page, too.", help_behavior_hint=""),
    ] = None
    json: Json = False

    def run(self) -> None:
        """Diagnose and print."""
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number above 0"
                )
        if not imports.is_function(self.model):
            raise InputError(f"{self.model}: expected module:function, which returns a model")
        model, batches = _model_and_batches(self.model)
        if self.data is not None:
            batches = self._batches(self.data)
        if batches is None:
            raise InputError(
                f"{self.model} returned a model alone: name its data with --data, or return "
                "(model, batches)"
            )
        if self.checkpoint is not None:
            _load(model, self.checkpoint)
        diagnosis = normlab.diagnose(model, batches)
        if self.json:
            print(json.dumps(diagnosis.to_json(), indent=2, allow_nan=False))
        else:
            _print(diagnosis)
        if self.report is not None:
            path = diagnosis.report(self.report)
            print(f"Report: {path}", file=sys.stderr if self.json else sys.stdout)
        if diagnosis.count("error"):
            sys.exit(1)

    def _batches(self, name: str) -> Iterable[Any]:
        if imports.is_function(name):
            found = imports.call(name)
            if not isinstance(found, data.Dataset) and not _is_arrays(found):
                return found
        if self.scaling not in data.SCALINGS:
            known = " or ".join(data.SCALINGS)
            raise InputError(f"--scaling {self.scaling}: expected {known}")
        dataset = data.load(name)
        # Of the training images: the test set decides nothing.
        order = torch.randperm(dataset.train_size, generator=stream(0, "doctor"))[: self.samples]
        return [
            (data.gather(dataset.images, index, self.scaling), dataset.labels[index])
            for index in order.split(self.batch_size)
        ]


def _is_arrays(found: Any) -> bool:
    """Tell whether a function returned what `normlab.data.load` takes of it."""
    import numpy as np

    parts = found.values() if isinstance(found, dict) else found
    return isinstance(parts, (tuple, list)) and all(isinstance(each, np.ndarray) for each in parts)


def _model_and_batches(name: str) -> tuple[nn.Module, Any]:
    found = imports.call(name)
    model, batches = found, None
    if isinstance(found, (tuple, list)) and len(found) == 2:
        model, batches = found
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name} returned {type(model).__name__}: expected a torch.nn.Module, or (model, "
            "batches)"
        )
    return model, batches


def _load(model: nn.Module, path: Path) -> None:
    """Load a state dict; what does not match is named."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    own = model.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} ({_shape(state[key])} for {_shape(own[key])})"
            for key in sorted(own.keys() & state.keys())
            if own[key].shape != state[key].shape
        ],
    }
    told = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in faults.items() if keys]
    if told:
        raise InputError(f"{path} does not match the model: {'; '.join(told)}")
    model.load_state_dict(state)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + ", …" * (len(keys) > 3)


def _print(diagnosis: normlab.Diagnosis) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in str(diagnosis).splitlines():
        style = _STYLES.get(line.partition(":")[0])
        console.print(line, style=style, markup=False)
