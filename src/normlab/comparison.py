"""The main job: run a study, keep it, compare its arms, draw the report."""

from __future__ import annotations

from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab import report as reports
from normlab import study as studies
from normlab.data import load

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Comparison", "compare", "default_folder"]


class Comparison(studies.Comparison):
    """What a study's ledger says, with the means to draw it.

    The last line of a notebook cell shows the verdicts, the table and the curves.

    Args:
        folder: Holds `ledger.sqlite`.
    """

    def chart(self, metric: str = "accuracy") -> alt.TopLevelMixin:
        """Return a chart: `accuracy`, `loss`, `difference` or `sensitivity`.

        Raises:
            InputError: There is no such chart.
        """
        return reports.chart(self, metric)

    def report(self, path: str | Path | None = None) -> Path:
        """Write `report.html`, the charts and `summary.json`, and return the page's path.

        Args:
            path: The folder to write to; the run's own if none is given.
        """
        return reports.write(self, Path(path) if path is not None else self.folder)

    def export(self, to: str, out: str | Path | None = None) -> str:
        """Write what the ledger says in a form that other programs read, and return where.

        Args:
            to: `csv`, `parquet`, `tensorboard` or `mlflow`.
            out: The folder to write to; the run's own if none is given, and in it `tensorboard` for
                that. For `mlflow` a tracking URI; MLflow's own setting if none is given.

        Raises:
            InputError: There is no such form, a package that it needs is missing, or MLflow cannot
                be reached.
            NormlabError: It cannot be written.
        """
        return reports.export(self, to, None if out is None else str(out))

    def __str__(self) -> str:
        lines = [*reports.headline(self), "", reports.text_table(self), "", *reports.remarks(self)]
        return "\n".join(lines).strip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import vl_convert

        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in reports.headline(self))
        curves = vl_convert.vegalite_to_svg(self.chart().to_dict())
        return sentences + reports.html_table(self) + curves


def compare(
    study: studies.Study | str | Path = "mnist-mlp-adam",
    *,
    out: str | Path | None = None,
    workers: int = 1,
    engine: str = "auto",
    device: str = "cpu",
    progress: bool = True,
    as_published: bool = False,
    tensorboard: bool = False,
    mlflow: str | None = None,
    watch: bool = False,
    **fields: Any,
) -> Comparison:
    """Compare the arms of a study: train what its ledger lacks, and say what came of it.

    Called again with the same study and folder, it goes on where it stopped, and a finished study
    is only read.

    Args:
        study: A study, the name of a bundled one, or the path of a TOML file.
        out: The run's folder; `runs/NAME-DIGEST` if none is given, the digest standing for all that
            is declared.
        workers: Processes to train in. The numbers do not depend on it. With more than 1, a script
            must keep its work under `if __name__ == "__main__":`, as for a DataLoader's workers.
        engine: `looped` trains one replica after another, `stacked` several in one operation;
            `auto` times both on each arm's own steps, and remembers.
        device: Where it is trained, as torch names it; on `cuda` every step is one graph.
        progress: Show progress on standard error.
        as_published: Do as the text that the study is of did: its splits, its one seed.
        tensorboard: Write event files to `tensorboard` in the run's folder, while it trains.
        mlflow: A tracking URI at which MLflow is to keep the run, while it trains.
        watch: Serve the report while it trains, to a browser on this machine; the address is
            written to standard error.
        **fields: Fields of the study that get another value, such as `seeds=5` or `epochs=2`.

    Returns:
        The comparison; its report is in the run's folder.

    Raises:
        InputError: The study, a field or the folder cannot be used; or a log, before anything is
            trained. One that fails later is warned of, and `Comparison.export` writes it.
        LedgerError: The ledger is damaged, or the disk is full.

    >>> compare("mnist-mlp-adam", epoch=2)
    Traceback (most recent call last):
    normlab.errors.InputError: mnist-mlp-adam: unknown key 'epoch' (did you mean epochs?)
    """
    chosen = study if isinstance(study, studies.Study) else studies.find_study(str(study))
    if as_published:
        chosen = chosen.as_published()
    declared = chosen.with_fields(fields, chosen.name)
    folder = Path(out) if out is not None else default_folder(declared)
    logs: list[reports.Log] = []
    if tensorboard:
        logs.append(reports.TensorBoard(folder / "tensorboard"))
    if mlflow is not None:
        logs.append(reports.Mlflow(mlflow))
    # Before the display of the run begins: a fetch shows a bar of its own.
    load(declared.dataset, progress=progress)
    live = reports.Live(declared) if progress else None
    page = reports.Watch(folder, live) if watch else None
    with page or nullcontext():
        with live or nullcontext(), reports.Logs(folder, logs, page or live) as watcher:
            studies.run(
                declared, folder, workers=workers, engine=engine, device=device, watcher=watcher
            )
        comparison = Comparison(folder)
        comparison.report()
    return comparison


def default_folder(study: studies.Study) -> Path:
    """Return the folder that a study runs in if none is named."""
    return Path("runs") / f"{study.name}-{study.fingerprint[:8]}"
