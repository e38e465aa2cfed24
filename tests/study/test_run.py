import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.study import run
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome


def measured(folder):
    """All that must not depend on how often a study was interrupted; times may."""
    with Ledger.read(folder) as ledger:
        measurements = [{**row, "time": None} for row in ledger.rows("measurement")]
        return measurements, [{**row, "seconds": None} for row in ledger.rows("replica")]


class Watcher:
    def __init__(self, stop_after=None):
        self.begun, self.events, self._stop_after = None, [], stop_after

    def begin(self, done, total):
        self.begun = (done, total)

    def __call__(self, event):
        self.events.append(event)
        if len(self.events) == self._stop_after:
            raise KeyboardInterrupt


def test_a_run_measures_every_split_of_every_replica_after_every_epoch(tiny, finished):
    measurements, replicas = measured(finished)
    assert [(row["arm"], row["seed"], row["status"]) for row in replicas] == [
        ("batch", 0, "done"), ("batch", 1, "done"), ("plain", 0, "done"), ("plain", 1, "done"),
    ]  # fmt: skip
    kinds = {(row["split"], row["metric"]) for row in measurements}
    splits = ("batches", "train", "validation", "test")
    assert kinds == {(split, metric) for split in splits for metric in ("loss", "accuracy")}
    assert {(row["step"], row["epoch"]) for row in measurements} == {(31, 1), (62, 2)}
    assert len(measurements) == len(tiny.replicas) * tiny.epochs * len(kinds)


def test_a_finished_run_is_only_read(tiny, finished):
    before = (finished / "ledger.sqlite").read_bytes()
    watcher = Watcher()
    run(tiny, finished, watcher=watcher)
    assert (watcher.begun, watcher.events) == ((4, 4), [])
    assert (finished / "ledger.sqlite").read_bytes() == before


def test_workers_train_on_the_users_own_data_as_this_process_does(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(5).integers(0, 256, (600, 5, 5), np.uint8)
    np.savez("mine.npz", images=images, labels=np.arange(600) % 3)
    fields = {"dataset": "mine.npz", "validation": 100, "network": "mlp:4", "arms": "plain"}
    study = tiny.with_fields(fields)
    run(study, tmp_path / "alone", engine="looped")
    monkeypatch.setattr("normlab.data.datasets.read_own", None)  # Workers are given what is here.
    run(study, tmp_path / "together", workers=2, engine="looped")
    assert measured(tmp_path / "together") == measured(tmp_path / "alone")


@pytest.mark.parametrize("events", [1, 2, 3, 5, 7, 8, 11, 13])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(
    tiny, finished, tmp_path, events
):
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, watcher=(first := Watcher(stop_after=events)))
    watcher = Watcher()
    run(tiny, tmp_path, watcher=watcher)
    done = sum(isinstance(event, Outcome) for event in first.events)
    assert watcher.begun == (done, 4)
    assert sum(isinstance(event, Outcome) for event in watcher.events) == 4 - done
    assert measured(tmp_path) == measured(finished)


@pytest.mark.parametrize("events", [3, 8, 19])
def test_what_probes_read_survives_an_interruption_and_changes_no_number(
    tiny, finished, tmp_path, events
):
    probed = tiny.with_fields({"probes": ["percentiles", "units"], "probe_every": 13})
    run(probed, tmp_path / "whole")
    assert measured(tmp_path / "whole") == measured(finished)
    with pytest.raises(KeyboardInterrupt):
        run(probed, tmp_path / "stopped", watcher=Watcher(stop_after=events))
    run(probed, tmp_path / "stopped", workers=2)
    assert measured(tmp_path / "stopped") == measured(finished)
    read = []
    for name in ("whole", "stopped"):
        with Ledger.read(tmp_path / name) as ledger:
            read.append(ledger.rows("probe"))
    assert read[0] == read[1]
    places = {(row["arm"], row["seed"], row["step"], row["epoch"]) for row in read[0]}
    steps = [(0, 0), (13, 0), (26, 0), (39, 1), (52, 1)]
    assert places == {(a, s, *at) for a in ("plain", "batch") for s in (0, 1) for at in steps}


def test_two_workers_measure_the_same_numbers(tiny, finished, tmp_path):
    watcher = Watcher()
    run(tiny, tmp_path, workers=2, watcher=watcher)
    assert sum(isinstance(event, Measurement) for event in watcher.events) == 8
    assert measured(tmp_path) == measured(finished)


def test_the_users_torch_is_left_as_it_was_found(tiny, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    run(tiny.with_fields({"seeds": 1, "epochs": 1, "arms": ["batch+dropout:0.5"]}), tmp_path)
    assert torch.get_rng_state().equal(before[0])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_killed_at_five_random_moments_a_run_ends_with_the_same_numbers(
    tiny, finished, tmp_path, workers
):
    file, out = tmp_path / "tiny.toml", tmp_path / "run"
    file.write_text(tiny.to_toml())
    command = [sys.executable, "-m", "normlab", "compare", str(file), "--out", str(out)]
    command += ["--workers", workers]
    moments = random.Random(workers)
    for _ in range(5):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # A run cannot be cut short before it has begun: importing torch is most of its start.
        while not (out / "ledger.sqlite").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.9))
        assert process.poll() is None, "the run was over before it could be killed"
        # The parent alone: its workers must notice.
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_session_ends(process.pid)
    subprocess.run(command, check=True, capture_output=True)
    assert measured(out) == measured(finished)


def assert_session_ends(session):
    deadline = time.monotonic() + 20
    while any(belongs_to(session, pid) for pid in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "worker processes outlive their parent"
        time.sleep(0.05)


def belongs_to(session, process):
    """Whether a process is of a session and alive, by /proc/PID/stat: state, parent, group, …"""
    try:
        state, _, _, its_session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return its_session == str(session) and state != "Z"
