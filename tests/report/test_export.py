import os
import sys

import pandas as pd
import pytest

from normlab.errors import InputError, NormlabError
from normlab.report import export


@pytest.fixture(scope="module")
def comparison(compared):
    """Two learning rates, one replica that diverged and one that has not ended."""
    return compared(
        seeds=3,
        lr=[0.1, 0.01],
        diverged=lambda one: one.arm == "plain" and one.seed == 1 and one.lr == 0.1,
        running=lambda one: one.arm == "batch" and one.seed == 2 and one.lr == 0.01,
    )


def read(path):
    """A table as pandas reads it, with times as times."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    table = pd.read_csv(path, engine="python")
    return table.assign(time=pd.to_datetime(table["time"])) if "time" in table else table


def same(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_tables_are_read_back_bit_for_bit(comparison, tmp_path, to):
    out = tmp_path / "new" / "tables"
    assert export(comparison, to, str(out)) == str(out)
    assert {path.name for path in out.iterdir()} == {f"measurements.{to}", f"replicas.{to}"}
    frame = comparison.frame()
    measurements = read(out / f"measurements.{to}")
    same(measurements.drop(columns="time"), frame.drop(columns="time"))
    assert list(measurements["time"]) == list(frame["time"])
    assert set(measurements["status"]) == {"done", "diverged", "running"}
    same(read(out / f"replicas.{to}"), comparison.replicas())


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_a_study_with_probes_has_their_table_too(compared, tmp_path, to):
    comparison = compared(seeds=2, probes=["smoothness", "units"])
    export(comparison, to, str(tmp_path))
    found = read(tmp_path / f"probes.{to}").fillna({"layer": ""})  # CSV has no empty text.
    same(found, comparison.probes())
    assert len(found) == 2 * 2 * 5 * 6


def test_without_a_folder_tables_go_to_the_runs_own(comparison):
    assert export(comparison, "csv") == str(comparison.folder)
    assert (comparison.folder / "measurements.csv").exists()


def test_an_empty_run_has_empty_tables(compared, tmp_path):
    empty = compared(missing=lambda _: True)
    for to in ("csv", "parquet"):
        export(empty, to, str(tmp_path))
        for name, expected in (("measurements", empty.frame()), ("replicas", empty.replicas())):
            found = read(tmp_path / f"{name}.{to}")
            assert (len(found), list(found)) == (0, list(expected))


def test_an_unknown_form_is_refused(comparison, tmp_path):
    with pytest.raises(InputError, match=r"unknown format 'parket' \(did you mean parquet\?\)"):
        export(comparison, "parket", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("parquet", "pyarrow", "parquet"),
        ("tensorboard", "tensorboard", "tensorboard"),
        ("mlflow", "mlflow", "mlflow"),
    ],
)
def test_a_form_whose_package_is_missing_leaves_nothing(
    comparison, tmp_path, monkeypatch, to, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"pip install 'normlab\[{extra}\]'"):
        export(comparison, to, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_csv_needs_no_extra(comparison, tmp_path, monkeypatch):
    for package in ("tensorboard", "mlflow"):  # pandas has pyarrow in its hands by now.
        monkeypatch.setitem(sys.modules, package, None)
    export(comparison, "csv", str(tmp_path))
    assert len(read(tmp_path / "replicas.csv")) == 11


def test_a_disk_that_is_full_leaves_the_old_table(comparison, tmp_path, monkeypatch):
    export(comparison, "csv", str(tmp_path))
    before = (tmp_path / "replicas.csv").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NormlabError, match="the tables cannot be written: No space left"):
        export(comparison, "csv", str(tmp_path))
    assert (tmp_path / "replicas.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_a_file_is_refused(comparison, tmp_path):
    (tmp_path / "file").write_text("x")
    for to in ("csv", "tensorboard"):
        with pytest.raises(NormlabError, match=r"file: .* cannot be written: "):
            export(comparison, to, str(tmp_path / "file"))
