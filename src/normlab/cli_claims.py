"""The command `normlab claims`: list them with their last verdicts, or test some."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from normlab import claims
from normlab import report as reports
from normlab.cli_data import Json
from normlab.errors import InputError

__all__ = ["Claims"]

_PATIENCE = 5.0  # Seconds after which one wants to hear how far it is.
_STYLES = {"supported": "bold green", "refuted": "bold red", "inconclusive": "bold yellow"}


@dataclass(frozen=True)
class Claims:
    """Test what is said of normalization; without names, list the claims and their verdicts."""

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="NAME ...", help="Claims to test.", help_behavior_hint=""),
    ] = ()
    all: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Test every claim.")] = (
        False
    )
    quick: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="Use fewer steps; such verdicts are kept apart and say so."),
    ] = False
    out: Annotated[
        Path,
        tyro.conf.arg(metavar="FOLDER", help="For what is measured; run again, it goes on."),
    ] = claims.FOLDER
    workers: Annotated[
        int,
        tyro.conf.arg(metavar="N", help="Processes to train in; the numbers do not depend on it."),
    ] = torch.get_num_threads()
    page: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE.md",
            help="Write all that is known to a page, with a picture of each.",
            help_behavior_hint="",
        ),
    ] = None
    json: Json = False

    def run(self) -> None:
        """Test or list, and print."""
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected a number above 0")
        if self.all and self.names:
            raise InputError("claims are named, and --all too: choose one")
        names = list(claims.CLAIMS) if self.all else list(self.names)
        for name in names:  # A name that is unknown is refused before the first is measured.
            claims.find(name)
        if self.quick and not names:
            raise InputError("--quick is for testing: name claims, or say --all")
        results = [self._check(name) for name in names]
        if not names:
            results = claims.last(out=self.out)
        if self.json:
            print(json.dumps([each.summary() for each in results], indent=2, allow_nan=False))
        elif not names:
            _list(results)
        if self.page is not None:
            claims.page(claims.last(out=self.out), self.page)
            print(f"Written: {self.page}", file=sys.stderr if self.json else sys.stdout)

    def _check(self, name: str) -> claims.Result:
        last = time.perf_counter()

        def seen(done: int, total: int) -> None:
            nonlocal last
            if time.perf_counter() - last >= _PATIENCE:
                print(f"{name}: {done} of {total} seeds", file=sys.stderr)
                last = time.perf_counter()

        result = claims.check(
            name,
            quick=self.quick,
            out=self.out,
            workers=self.workers,
            watcher=reports.Live,
            seen=seen,
        )
        if not self.json:
            Console(highlight=False).print(str(result) + "\n", markup=False, soft_wrap=True)
        return result


def _list(results: list[claims.Result]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("claim", "verdict", ""):
        table.add_column(column, header_style="", no_wrap=column != "")
    for each in results:
        verdict = each.verdict
        word = verdict or (
            f"{len(each.kept)} of {len(each.claim.seeds)} seeds" if each.kept else "—"
        )
        quick = ", quick" if each.quick else ""
        table.add_row(
            each.claim.name,
            f"[{_STYLES[verdict]}]{word}[/]{quick}" if verdict else f"{word}{quick}",
            each.claim.statement,
        )
    Console(highlight=False).print(table)
