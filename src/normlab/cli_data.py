"""The commands of `normlab data`: list, fetch, where, verify and show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normlab import data
from normlab.errors import InputError, NormlabError
from normlab.files import replace

__all__ = ["Data", "Json"]

Json = Annotated[
    tyro.conf.FlagCreatePairsOff[bool],
    tyro.conf.arg(help="Print one JSON document, and nothing else, on standard output."),
]
_Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME", help="A published set.")]


@dataclass(frozen=True)
class List:
    """List the published sets, and where those that are here are kept."""

    json: Json = False

    def run(self) -> None:
        """Print a line for each."""
        sets = []
        for name in data.dataset_names():
            path = data.where(name)
            sets.append({**data.published_facts(name), "path": str(path) if path else None})
        if self.json:
            print(json.dumps(sets, indent=2))
            return
        for each in sets:
            shape = "×".join(map(str, each["image_shape"]))
            counts = f"{each['train']:,} + {each['test']:,}"
            kept = each["path"] or f"not here: normlab data fetch {each['name']}"
            print(f"{each['name']:13}  {shape:7}  {counts:15}  {each['classes']} classes  {kept}")


@dataclass(frozen=True)
class Fetch:
    """Put sets where they are found, from the first source that has them."""

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="NAME ...", help="Published sets."),
    ]
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help="A folder that may hold their files.",
            help_behavior_hint="(the folder that NORMLAB_DATA names)",
        ),
    ] = None

    def run(self) -> None:
        """Print the path of each."""
        if not self.names:
            raise InputError(f"name a set: {', '.join(data.dataset_names())}")
        for name in self.names:
            data.where(name)  # A name that is unknown is refused before the first download.
        for name in self.names:
            print(data.fetch(name, data_dir=self.data_dir))


@dataclass(frozen=True)
class Where:
    """Print the path of the file that holds a set; fail if it is not here."""

    name: _Name

    def run(self) -> None:
        """Print it."""
        path = data.where(self.name)
        if path is None:
            raise NormlabError(f"{self.name} is not here: normlab data fetch {self.name} gets it")
        print(path)


@dataclass(frozen=True)
class Verify:
    """Read sets again and compare their arrays with what was published."""

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="NAME ...", help="Published sets.", help_behavior_hint="(all that are here)"
        ),
    ] = ()
    json: Json = False

    def run(self) -> None:
        """Print a line for each; fail at the end if one is not here or not as published."""
        faults: dict[str, str | None] = {}
        for name in self.names or [name for name in data.dataset_names() if data.where(name)]:
            try:
                data.verify(name)
            except InputError:
                raise
            except NormlabError as error:
                faults[name] = str(error)
            else:
                faults[name] = None
        if self.json:
            print(json.dumps(faults, indent=2))
        else:
            for name, fault in faults.items():
                print(fault or f"{name}: all arrays are as they were published")
        found = [name for name, fault in faults.items() if fault]
        if found:
            raise NormlabError(f"not here, or not as published: {', '.join(found)}")


@dataclass(frozen=True)
class Show:
    """Describe a set or your own data: counts, shapes, mean and deviation, and its images."""

    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="NAME",
            help="A published set, FILE.npz, a folder of images by class, or module:function.",
        ),
    ]
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE.png",
            help="Draw images of each class to this file.",
            help_behavior_hint="",
        ),
    ] = None
    json: Json = False

    def run(self) -> None:
        """Describe it, and draw."""
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise InputError(f"--out {self.out}: expected a file whose name ends in .png")
        dataset = data.load(self.name)
        if self.out is not None:
            try:
                replace(self.out, data.contact_sheet(dataset))
            except OSError as error:
                raise InputError(f"{self.out} cannot be written: {error.strerror}") from None
        described = data.describe(dataset)
        print(json.dumps(described.to_json(), indent=2) if self.json else described)


@dataclass(frozen=True)
class Data:
    """Fetch, check and look at data sets."""

    command: List | Fetch | Where | Verify | Show

    def run(self) -> None:
        """Do what was asked for."""
        self.command.run()
