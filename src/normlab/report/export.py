"""The ledger in forms that other programs read."""

from __future__ import annotations

from pathlib import Path

from normlab.errors import InputError, NormlabError, did_you_mean
from normlab.files import replace
from normlab.report.logs import Log, require
from normlab.report.mlflow import Mlflow
from normlab.report.tensorboard import TensorBoard
from normlab.study import Comparison

__all__ = ["FORMATS", "export"]

FORMATS = ("csv", "parquet", "tensorboard", "mlflow")
"""What `export` can write."""


def export(comparison: Comparison, to: str, out: str | None = None) -> str:
    """Write what a ledger says in a form that other programs read.

    Args:
        comparison: What to write.
        to: One of `FORMATS`. `csv` and `parquet` are tables: `measurements`, one a row, with the
            columns of `Comparison.frame`; `replicas`, one a row, with those of
            `Comparison.replicas`; and of a study with probes `probes`, one number a row, with those
            of `Comparison.probes`.
        out: The folder to write to, made if need be: the run's own if none is given, and in it
            `tensorboard` for that. For `mlflow` a tracking URI; MLflow's own setting if none is
            given.

    Returns:
        Where it was written.

    Raises:
        InputError: There is no such form, a package that it needs is missing, or MLflow cannot be
            reached.
        NormlabError: It cannot be written.
    """
    if to not in FORMATS:
        raise InputError(
            f"unknown format {to!r}{did_you_mean(to, FORMATS)}: known are {', '.join(FORMATS)}"
        )
    if to in ("csv", "parquet"):
        return _write_tables(comparison, to, Path(out) if out else comparison.folder)
    log: Log = (
        Mlflow(out)
        if to == "mlflow"
        else TensorBoard(Path(out) if out else comparison.folder / "tensorboard")
    )
    log.write(comparison)
    return log.out


def _write_tables(comparison: Comparison, to: str, folder: Path) -> str:
    if to == "parquet":
        require("pyarrow", "parquet")
    tables = {"measurements": comparison.frame(), "replicas": comparison.replicas()}
    if comparison.study.probes:
        tables["probes"] = comparison.probes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            content = table.to_csv(index=False) if to == "csv" else table.to_parquet(index=False)
            replace(folder / f"{name}.{to}", content)
    except OSError as error:
        raise NormlabError(f"{folder}: the tables cannot be written: {error.strerror}") from None
    return str(folder)
