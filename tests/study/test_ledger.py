import fcntl
import json
import sqlite3
import threading
import time
from datetime import datetime

import pytest

from normlab.errors import InputError, LedgerError
from normlab.probes import Histogram
from normlab.study import Comparison, Study
from normlab.study import ledger as ledger_module
from normlab.study.ledger import FILENAME, Ledger
from normlab.training import Measurement, Outcome, Reading, Replica

STUDY = Study(seeds=2)
FIRST = Replica("plain", 0.01, 0)
VALUES = {("test", "loss"): 0.1 + 0.2, ("test", "accuracy"): 0.9}
HISTOGRAMS = {
    "hidden0.norm": {
        "output": Histogram(-0.1, 0.1 + 0.2, [3, 0, 1]),
        "weight": Histogram(1.0, 1.0, [0, 0, 8]),
    }
}


READ = {
    "units": {"b": {"dead": 0.0}, "a": {"dead": 0.1 + 0.2}},
    "smoothness": {"": {"loss.range": 1e-300}},
}


def fill(folder, *events):
    with Ledger.write(folder, STUDY) as ledger:
        ledger.begin_session(workers=1)
        for event in events:
            ledger.add(event, seconds=1.5)


def read(folder, table):
    with Ledger.read(folder) as ledger:
        return ledger.rows(table)


def test_what_is_kept_is_read_back_exactly(tmp_path):
    fill(tmp_path / "run", Measurement(FIRST, 10, 1, VALUES), Outcome(FIRST, "done", 10, 2.5))
    with Ledger.read(tmp_path / "run") as ledger:
        assert ledger.study == STUDY
        assert ledger.finished() == {FIRST}
    (session,) = read(tmp_path / "run", "session")
    rows = read(tmp_path / "run", "measurement")
    times = {row.pop("time") for row in rows}
    key = {**FIRST._asdict(), "step": 10, "epoch": 1, "split": "test"}
    assert rows == [
        {**key, "metric": "accuracy", "value": 0.9},
        {**key, "metric": "loss", "value": 0.1 + 0.2},
    ]
    # Of the start the session keeps whole seconds.
    (passed,) = (time - datetime.fromisoformat(session["started"]).timestamp() for time in times)
    assert 1.5 <= passed < 2.5
    assert (session["seconds"], session["workers"]) == (1.5, 1)
    assert '"torch"' in session["versions"]


@pytest.mark.parametrize("table", ["measurement", "histogram", "probe"])
def test_what_a_replica_without_outcome_measured_is_made_again(tmp_path, table):
    second = Replica("batch", 0.01, 0)
    fill(
        tmp_path,
        Measurement(FIRST, 10, 1, VALUES, HISTOGRAMS),
        Reading(FIRST, 10, 1, READ),
        Outcome(FIRST, "done", 10, 1.0),
        Measurement(second, 10, 1, VALUES, HISTOGRAMS),
        Reading(second, 10, 1, READ),
    )
    assert {row["arm"] for row in read(tmp_path, table)} == {"plain", "batch"}
    fill(tmp_path, Measurement(second, 10, 1, VALUES, HISTOGRAMS), Reading(second, 10, 1, READ))
    fill(tmp_path)
    assert {row["arm"] for row in read(tmp_path, table)} == {"plain"}


def test_histograms_are_read_back_exactly(tmp_path):
    fill(tmp_path, Measurement(FIRST, 10, 1, VALUES, HISTOGRAMS))
    key = {**FIRST._asdict(), "step": 10, "epoch": 1, "layer": "hidden0.norm"}
    expected = [
        {**key, "name": "output", "low": -0.1, "high": 0.1 + 0.2, "counts": [3, 0, 1]},
        {**key, "name": "weight", "low": 1.0, "high": 1.0, "counts": [0, 0, 8]},
    ]
    found = Comparison(tmp_path).histograms()
    assert found.to_dict("records") == expected
    fill(tmp_path / "none")
    assert list(Comparison(tmp_path / "none").histograms()) == list(found)


def test_what_probes_read_is_read_back_exactly(tmp_path):
    fill(tmp_path, Reading(FIRST, 0, 0, {"units": {}}), Reading(FIRST, 7, 0, READ))
    key = {"arm": "plain", "lr": 0.01, "weight_decay": 0.0, "seed": 0, "step": 7, "epoch": 0}
    expected = [
        {**key, "probe": "smoothness", "layer": "", "name": "loss.range", "value": 1e-300},
        {**key, "probe": "units", "layer": "a", "name": "dead", "value": 0.1 + 0.2},
        {**key, "probe": "units", "layer": "b", "name": "dead", "value": 0.0},
    ]
    found = Comparison(tmp_path).probes()
    assert found.to_dict("records") == expected
    assert list(found) == list(expected[0])
    fill(tmp_path / "none")
    assert list(Comparison(tmp_path / "none").probes()) == list(found)


def test_a_measurement_is_kept_whole_or_not_at_all(tmp_path):
    broken = Measurement(FIRST, 10, 1, {**VALUES, ("test", "nothing"): None})
    with pytest.raises(LedgerError):
        fill(tmp_path, broken)
    assert read(tmp_path, "measurement") == []


def test_measurements_can_be_read_while_a_run_adds_to_them(tmp_path):
    with Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        ledger.add(Measurement(FIRST, 10, 1, VALUES), seconds=1.0)
        assert len(read(tmp_path, "measurement")) == 2


def test_reading_changes_nothing_in_the_folder(tmp_path):
    def contents():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    fill(tmp_path, Measurement(FIRST, 10, 1, VALUES))
    before = contents()
    assert len(read(tmp_path, "measurement")) == 2
    assert not Ledger.in_use(tmp_path)
    assert contents() == before


def test_a_ledger_that_is_written_to_as_it_is_read_is_not_taken_for_whole(tmp_path):
    fill(tmp_path)
    with (
        pytest.raises(LedgerError, match="was written to while it was read: read it again"),
        Ledger.read(tmp_path),
    ):
        fill(tmp_path, Measurement(FIRST, 10, 1, VALUES))


def test_the_file_alone_is_the_ledger_though_a_reader_is_late(tmp_path):
    with Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        ledger.add(Measurement(FIRST, 10, 1, VALUES), seconds=1.0)
        reader = sqlite3.connect(tmp_path / FILENAME)
        assert reader.execute("SELECT count(*) FROM measurement").fetchone() == (2,)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / FILENAME).write_bytes((tmp_path / FILENAME).read_bytes())
    reader.close()
    assert len(read(tmp_path / "copy", "measurement")) == 2


def test_the_stamp_changes_with_what_is_written_and_not_with_what_is_read(tmp_path):
    assert Ledger.stamp(tmp_path) == ""
    stamps = []
    with Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        stamps.append(Ledger.stamp(tmp_path))
        for step in range(3):
            # Clocks of file systems tick every few milliseconds.
            time.sleep(0.02)
            ledger.add(Measurement(FIRST, step, 1, VALUES), seconds=1.0)
            stamps.append(Ledger.stamp(tmp_path))
            read(tmp_path, "measurement")
            assert Ledger.stamp(tmp_path) == stamps[-1]
    assert len({*stamps, Ledger.stamp(tmp_path)}) == 5


def test_a_ledger_is_in_use_as_long_as_it_can_be_written_to(tmp_path):
    assert not Ledger.in_use(tmp_path)
    with Ledger.write(tmp_path, STUDY):
        assert Ledger.in_use(tmp_path)
    assert not Ledger.in_use(tmp_path)


def test_a_run_waits_for_who_asks_whether_it_is_in_use(tmp_path):
    (tmp_path / "ledger.lock").touch()
    with (tmp_path / "ledger.lock").open() as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        threading.Timer(0.03, asker.close).start()
        fill(tmp_path)
    assert len(read(tmp_path, "session")) == 1


def test_a_ledger_from_before_there_were_devices_is_the_cpus(tmp_path):
    with Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        ledger._connection.execute("UPDATE session SET machine = json_remove(machine, '$.device')")
    with Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        with pytest.raises(InputError, match="was begun with device cpu, and this is a GPU, whose"):
            ledger.begin_session(workers=1, device="a GPU")
    devices = [json.loads(row["machine"]).get("device") for row in read(tmp_path, "session")]
    assert devices == [None, "cpu"]


def test_a_study_of_other_data_is_refused_and_left_alone(tmp_path):
    mine = STUDY.with_fields({"dataset": "./mine.npz"})
    for _ in range(2):
        with Ledger.write(tmp_path, mine, {"dataset": "a1" * 32}) as ledger:
            ledger.begin_session(workers=1)
    before = (tmp_path / FILENAME).read_bytes()
    refusal = r"another dataset: the SHA-256 of ./mine.npz was a1a1a1a1a1a1…, and is b2b2b2b2b2b2…"
    with (
        pytest.raises(InputError, match=refusal),
        Ledger.write(tmp_path, mine, {"dataset": "b2" * 32}),
    ):
        pass
    assert (tmp_path / FILENAME).read_bytes() == before


def test_a_folder_with_another_study_is_refused_and_left_alone(tmp_path):
    fill(tmp_path)
    before = (tmp_path / FILENAME).read_bytes()
    other = STUDY.with_fields({"epochs": 3})
    with (
        pytest.raises(InputError, match=r"holds another study \(its epochs is 10, not 3\)"),
        Ledger.write(tmp_path, other),
    ):
        pass
    assert (tmp_path / FILENAME).read_bytes() == before


def test_a_study_begun_with_another_torch_is_not_mixed_with_this_one(tmp_path, monkeypatch):
    fill(tmp_path, Measurement(FIRST, 10, 1, VALUES), Outcome(FIRST, "done", 10, 1.0))
    versions = {**ledger_module._versions(), "torch": "1.0"}
    monkeypatch.setattr(ledger_module, "_versions", lambda: versions)
    with pytest.raises(InputError, match=r"was begun with torch .*, and this is 1.0"):
        fill(tmp_path)
    assert len(read(tmp_path, "session")) == 1


def test_two_writers_do_not_meet(tmp_path):
    with (
        Ledger.write(tmp_path, STUDY),
        pytest.raises(InputError, match="in use by another run"),
        Ledger.write(tmp_path, STUDY),
    ):
        pass


def test_a_lock_ends_with_its_writer(tmp_path):
    fill(tmp_path)
    fill(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        fill(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        fill(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "x"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        read(tmp_path, "replica")
    with pytest.raises(InputError, match="holds no run"):
        read(tmp_path / "absent", "replica")


@pytest.mark.parametrize("damage", ["garbage", "cut", "torn"])
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path, damage):
    fill(tmp_path, *(Measurement(FIRST, step, 1, VALUES) for step in range(500)))
    path = tmp_path / FILENAME
    good = path.read_bytes()
    bad = {
        "garbage": b"not a database at all, but long enough to look like one" * 40,
        "cut": good[: len(good) // 2],
        "torn": good[:8192] + b"\xff" * 8192 + good[16384:],
    }[damage]
    path.write_bytes(bad)
    for attempt in (lambda: fill(tmp_path), lambda: read(tmp_path, "measurement")):
        with pytest.raises(LedgerError, match="move it away to start anew") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == bad


def test_another_programs_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / FILENAME)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    before = (tmp_path / FILENAME).read_bytes()
    with pytest.raises(LedgerError, match="is not a ledger of normlab"):
        fill(tmp_path)
    with pytest.raises(LedgerError, match="is not a ledger of normlab"):
        read(tmp_path, "measurement")
    assert (tmp_path / FILENAME).read_bytes() == before


def test_a_full_disk_keeps_what_was_measured(tmp_path):
    steps = []

    def fill_the_disk():
        with Ledger.write(tmp_path, STUDY) as ledger:
            ledger.begin_session(workers=1)
            (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
            ledger._connection.execute(f"PRAGMA max_page_count = {pages + 3}")
            for step in range(10_000):
                ledger.add(Measurement(FIRST, step, 1, VALUES), seconds=1.0)
                steps.append(step)

    with pytest.raises(LedgerError, match="full"):
        fill_the_disk()
    assert sorted({row["step"] for row in read(tmp_path, "measurement")}) == steps
    assert len(steps) > 10


def test_a_ledger_of_another_version_is_refused_and_left_alone(tmp_path):
    fill(tmp_path)
    with sqlite3.connect(tmp_path / FILENAME) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    for use in (Ledger.read(tmp_path), Ledger.write(tmp_path, STUDY)):
        with pytest.raises(LedgerError, match="is of another version of normlab: use that"), use:
            pass


@pytest.mark.parametrize(("version", "lacking"), [(3, ["histogram", "probe"]), (4, ["probe"])])
def test_an_older_ledger_is_read_as_it_is_and_gone_on_with(version, lacking, tmp_path):
    fill(tmp_path, Measurement(FIRST, 10, 1, VALUES), Outcome(FIRST, "done", 10, 2.5))
    with sqlite3.connect(tmp_path / FILENAME) as connection:
        for table in lacking:
            connection.execute(f"DROP TABLE {table}")
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before, replicas = (tmp_path / FILENAME).read_bytes(), read(tmp_path, "replica")
    assert replicas
    assert [read(tmp_path, table) for table in lacking] == [[] for _ in lacking]
    assert (tmp_path / FILENAME).read_bytes() == before
    with Ledger.write(tmp_path, STUDY) as ledger:
        assert ledger.rows("replica") == replicas
        assert [ledger.rows(table) for table in lacking] == [[] for _ in lacking]
    with sqlite3.connect(tmp_path / FILENAME) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (5,)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert set(lacking) <= tables
    connection.close()
