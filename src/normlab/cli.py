"""The command line: parse, call one function, print."""

from __future__ import annotations

import dataclasses
import io
import json
import operator
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial, reduce
from itertools import dropwhile, islice, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

import normlab
from normlab import report as reports
from normlab.cli_claims import Claims
from normlab.cli_data import Data, Json
from normlab.cli_doctor import Doctor
from normlab.errors import FetchError, InputError, NormlabError
from normlab.study import Study, bundled_studies, find_study, layers_of
from normlab.study.declaration import FOR_PEOPLE
from normlab.training import Recipe
from normlab.training.devices import find_device

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compare:
    """Compare the arms of a study: train what is missing in its ledger, then report.

    The options after --json change a field of the study.
    """

    study: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(help="A bundled study, or a TOML file.", metavar="STUDY"),
    ] = "mnist-mlp-adam"
    out: Annotated[
        str | None,
        tyro.conf.arg(
            help="Folder of the run.", metavar="FOLDER", help_behavior_hint="(runs/NAME-DIGEST)"
        ),
    ] = None
    workers: Annotated[
        str | None,
        tyro.conf.arg(
            help="Processes to train in; the numbers do not depend on it.",
            metavar="N",
            help_behavior_hint=f"({torch.get_num_threads()}, or 1 on a GPU)",
        ),
    ] = None
    engine: Annotated[
        str,
        tyro.conf.arg(
            help="auto times looped and stacked on each arm, and remembers.", metavar="ENGINE"
        ),
    ] = "auto"
    device: Annotated[
        str,
        tyro.conf.arg(help="Where to train: cpu, or cuda where torch has a GPU.", metavar="DEVICE"),
    ] = "cpu"
    as_published: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="As the text that the study is of had it: its splits, its one seed."),
    ] = False
    tensorboard: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="Write TensorBoard's event files while training."),
    ] = False
    mlflow: Annotated[
        str | None,
        tyro.conf.arg(
            help="Tracking URI to log to while training.", metavar="URI", help_behavior_hint=""
        ),
    ] = None
    watch: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="Serve the report while training, to a browser on this machine."),
    ] = False
    json: Json = False

    def run(self) -> None:
        """Train, report and print."""
        given = {name: getattr(self, name) for name in _OVERRIDES}
        fields = {
            # One value is a value: `--seeds 10` is a number of seeds, `--seeds 3 7` names two.
            name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
            for name, value in given.items()
            if value is not None
        }
        if self.workers is None:
            on_cpu = find_device(self.device).type == "cpu"
            workers = torch.get_num_threads() if on_cpu else 1
        elif self.workers.isdecimal():
            workers = int(self.workers)
        else:
            raise InputError(f"--workers {self.workers}: expected a whole number above 0")
        _print(
            normlab.compare(
                self.study,
                as_published=self.as_published,
                out=self.out,
                workers=workers,
                engine=self.engine,
                device=self.device,
                tensorboard=self.tensorboard,
                mlflow=self.mlflow,
                watch=self.watch,
                **fields,
            ),
            self.json,
        )


# The study's own fields first, then those of its recipe.
_OVERRIDES = sorted(
    (name for name in Study.model_fields if name not in FOR_PEOPLE),
    key=lambda name: name in Recipe.model_fields,
)


def _with_overrides() -> type[_Compare]:
    """Derive the other options of `compare` from the fields of `Study`.

    Values stay text here: the study's own checks read them, so a mistake gets the same line on the
    command line, in Python and in TOML.
    """
    options: list[tuple[str, Any, Any]] = []
    for name in _OVERRIDES:
        several = name in ("arms", "lr", "weight_decay", "seeds", "probes")
        argument = tyro.conf.arg(
            help=Study.model_fields[name].description,
            metavar="VALUE ..." if several else "VALUE",
            help_behavior_hint="",
        )
        kind: Any = tuple[str, ...] | None if several else str | None
        options.append((name, Annotated[kind, argument], dataclasses.field(default=None)))
    compare = dataclasses.make_dataclass(
        "Compare", options, bases=(_Compare,), frozen=True, kw_only=True
    )
    compare.__doc__ = _Compare.__doc__
    return compare


Compare = _with_overrides()


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the report of a run again, from its ledger alone; of several, one page of all."""

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(
            help="Folder of the run. Several are set side by side, each judged by itself.",
            metavar="FOLDER ...",
            help_behavior_hint="",
        ),
    ]
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Folder to write to: report.html, or runs.html of several.",
            metavar="FOLDER",
            help_behavior_hint="(the run's own; of several the current one)",
        ),
    ] = None
    json: Json = False

    def run(self) -> None:
        """Report and print."""
        if not self.folders:
            raise InputError("report: expected FOLDER of a run; see normlab report --help")
        comparisons = [normlab.Comparison(folder) for folder in self.folders]
        if len(comparisons) == 1:
            path = comparisons[0].report(self.out)
            _print(comparisons[0], self.json, path)
            return
        path = reports.write_runs(comparisons, self.out or Path())
        if self.json:
            summaries = [comparison.summary() for comparison in comparisons]
            print(json.dumps(summaries, indent=2, allow_nan=False))
            return
        for comparison in comparisons:
            print(f"{comparison.folder}:", *reports.headline(comparison), sep="\n  ")
        print(f"Report: {path}")


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show the report of a run that goes on, in a browser on this machine, until it is complete."""

    folder: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(help="Folder of the run.", metavar="FOLDER")
    ]
    port: Annotated[
        int,
        tyro.conf.arg(help="To listen at on 127.0.0.1.", metavar="N", help_behavior_hint="(free)"),
    ] = 0
    open: Annotated[
        tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Open the page in a browser.")
    ] = False

    def run(self) -> None:
        """Serve, and print where."""
        say = partial(print, flush=True)  # It may be read by a program that waits for it.
        reports.watch(self.folder, self.port, browser=self.open, say=say)


@dataclasses.dataclass(frozen=True)
class Export:
    """Write what a run's ledger says in a form that other programs read."""

    folder: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(help="Folder of the run.", metavar="FOLDER")
    ]
    to: Annotated[
        str,
        tyro.conf.arg(
            help="csv or parquet: tables of measurements, replicas and what probes read. "
            "tensorboard: event files. mlflow: runs.",
            metavar="|".join(reports.FORMATS),
        ),
    ]
    out: Annotated[
        str | None,
        tyro.conf.arg(
            help="Folder to write to; for mlflow a tracking URI.",
            metavar="FOLDER|URI",
            help_behavior_hint="(FOLDER, FOLDER/tensorboard, or MLflow's own setting)",
        ),
    ] = None

    def run(self) -> None:
        """Write, and print where."""
        where = normlab.Comparison(self.folder).export(self.to, self.out)
        print(f"Written: {where}")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show the networks of a study layer by layer; of a run, also what their norms learned."""

    what: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(help="Folder of a run, a bundled study, or a TOML file.", metavar="WHAT"),
    ]
    json: Json = False

    def run(self) -> None:
        """Print a table for each arm."""
        if Path(self.what).is_dir() or "/" in self.what.removesuffix(".toml"):
            frame = normlab.Comparison(self.what).layers()
        else:
            frame = layers_of(find_study(self.what))
        if self.json:
            print(frame.to_json(orient="records", indent=2))
        else:
            Console(highlight=False).print(reports.LayersTable(frame))


@dataclasses.dataclass(frozen=True)
class Studies:
    """List the bundled studies."""

    def run(self) -> None:
        """Print one line for each."""
        studies = bundled_studies()
        width = max(map(len, studies))
        for name, study in studies.items():
            print(f"{name:{width}}  {study.description}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure what is fast and what is not, against named peers in the same run."""

    what: Annotated[
        tyro.conf.Positional[Literal["layers", "fleet"]],
        tyro.conf.arg(
            help="layers: batch norm, against torch's eager and compiled. fleet: training, against "
            "the tutorials' loop, eager and compiled torch, and JAX."
        ),
    ]
    seconds: Annotated[
        float | None,
        tyro.conf.arg(
            help="To spend on each row of the table.",
            metavar="S",
            help_behavior_hint="(2 for layers, 30 for fleet)",
        ),
    ] = None
    device: Annotated[
        str, tyro.conf.arg(help="Of fleet: where to train, cpu or cuda.", metavar="DEVICE")
    ] = "cpu"
    json: Json = False

    def run(self) -> None:
        """Measure and print."""
        from normlab import bench

        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"--seconds {self.seconds}: expected a number above 0")
        if self.what == "layers" and find_device(self.device).type != "cpu":
            raise InputError(f"--device {self.device} belongs to fleet: layers are timed on a CPU")
        benchmark = (
            bench.bench_layers(seconds=self.seconds or 2.0)
            if self.what == "layers"
            else bench.bench_fleet(
                seconds=self.seconds or 30.0,
                fleets=bench.own_fleets(),
                device=self.device,
                started=lambda work: print(f"measuring {work.name} …", file=sys.stderr),
            )
        )
        print(json.dumps(benchmark.to_json(), indent=2) if self.json else benchmark)


_COMMANDS = (Compare, Report, Watch, Export, Inspect, Doctor, Claims, Studies, Data, Bench)
_COMMAND: Any = reduce(operator.or_, _COMMANDS)  # The union of them, which tyro reads.


def _print(comparison: normlab.Comparison, as_json: bool, page: Path | None = None) -> None:
    if as_json:
        print(json.dumps(comparison.summary(), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print()
    for sentence in reports.headline(comparison):
        console.print(sentence, style="bold", markup=False)
    console.print()
    console.print(reports.TerminalTable(comparison))
    console.print()
    for remark in reports.remarks(comparison):
        console.print(remark, markup=False)
    page = page or comparison.folder / "report.html"
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `normlab` command.

    Args:
        arguments: Of the command line; the process's own if none are given.

    Raises:
        SystemExit: With 2 if the input cannot be used, 130 after Ctrl-C, 1 on other failures.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"normlab {normlab.__version__}")
        return
    try:
        try:
            _parse(arguments or ["--help"]).run()
        finally:
            sys.stdout.flush()  # A closed pipe is heard here, not when Python exits.
    except InputError as error:
        _fail(2, str(error))
    except FetchError as error:
        _fail(1, *str(error).splitlines())
    except NormlabError as error:
        _fail(1, str(error))
    except BrokenPipeError:
        # The reader of our output went away; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _fail(130, "interrupted; what was measured is kept: run the same command again to go on")


def _parse(arguments: Sequence[str]) -> Any:
    """Return the command with its options; what cannot be parsed gets one line, not a box."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                _COMMAND,
                prog="normlab",
                description="Does normalization help your network? Compare it with and without, "
                "over many seeds. (--version prints the version.)",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as end:
        if not end.code:
            raise
        # The box says what is wrong between its title and its first rule.
        lines = (line.strip("│╭╮╰╯|+ ") for line in complaint.getvalue().splitlines())
        below_title = dropwhile(_is_rule, islice(lines, 1, None))
        words = takewhile(lambda line: not _is_rule(line), below_title)
        known = {each.__name__.lower() for each in _COMMANDS}
        command = f"{arguments[0]} " * (arguments[0] in known)
        raise InputError(f"{' '.join(words)}; see normlab {command}--help") from None


def _is_rule(line: str) -> bool:
    return not line.strip("─- ")


def _fail(code: int, *lines: str) -> None:
    print("normlab: " + "\n  ".join(" ".join(line.split()) for line in lines), file=sys.stderr)
    sys.exit(code)
