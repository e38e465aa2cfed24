import re
import sys

import pytest

from normlab.errors import InputError, NormlabError
from normlab.report import Logs
from normlab.report.logs import Point, courses, require, run_name
from normlab.study import Comparison, Study, run
from normlab.training import Measurement, Outcome, Replica

TINY = Study(network="mlp:8", arms=["plain", "batch"], validation=59_000, seeds=1, epochs=2)


class Log:
    """Keeps how many measurements it was shown each time; fails at one of them."""

    name, out = "recorder", "some where"

    def __init__(self, fails_at=None):
        self.seen, self._fails_at = [], fails_at

    def write(self, comparison):
        self.seen.append(len(comparison.frame()))
        if len(self.seen) == self._fails_at:
            raise NormlabError("no\nroom")


class Display:
    def __init__(self):
        self.begun, self.events = None, []

    def begin(self, done, total):
        self.begun = (done, total)

    def __call__(self, event):
        self.events.append(event)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the time finds it `clock.step` seconds later."""

    class Clock:
        now, step = 0.0, 0.0

        def perf_counter(self):
            self.now += self.step
            return self.now

    monkeypatch.setattr("normlab.report.logs.time", clock := Clock())
    return clock


@pytest.mark.usefixtures("clock")
def test_logs_are_written_before_while_and_after_training(tmp_path):
    log, display = Log(), Display()
    with Logs(tmp_path, [log], display) as logs:
        run(TINY, tmp_path, watcher=logs)
    kinds = {type(event) for event in display.events}
    assert display.begun == (0, 2)
    assert kinds > {Measurement, Outcome}
    # Time stands still, so that none of the events comes too early for the logs.
    assert len(log.seen) == 1 + len(display.events) + 1
    assert log.seen[0] == 0
    assert log.seen[-1] == len(Comparison(tmp_path).frame()) == 2 * 2 * 8
    assert sorted(log.seen) == log.seen


def test_logs_take_a_twentieth_of_the_time(make_run, clock):
    log = Log()
    logs = Logs(make_run(), [log])
    clock.step = 1.0
    # Each of the 200 looks takes a second, and writing one more, after which 19 are left out.
    for _ in range(200):
        logs(None)
    assert 8 <= len(log.seen) <= 10


def test_a_log_that_cannot_begin_ends_the_run_before_it_trains(tmp_path):
    with (
        pytest.raises(NormlabError, match="no\nroom"),
        Logs(tmp_path, [Log(fails_at=1)]) as logs,
    ):
        run(TINY, tmp_path, watcher=logs)
    assert len(Comparison(tmp_path).frame()) == 0


@pytest.mark.usefixtures("clock")
def test_a_log_that_fails_later_is_warned_of_and_left_alone(tmp_path, capsys):
    broken, whole = Log(fails_at=3), Log()
    with Logs(tmp_path, [broken, whole]) as logs:
        run(TINY, tmp_path, watcher=logs)
    assert capsys.readouterr().err == (
        "normlab: warning: the log for recorder ends here (no room); the ledger is whole, and "
        f"writes it again: normlab export {tmp_path} --to recorder --out 'some where'\n"
    )
    assert len(broken.seen) == 3
    assert whole.seen[-1] == len(Comparison(tmp_path).frame()) == 32


def test_an_interrupted_run_does_not_wait_for_its_logs(make_run):
    log = Log()
    with pytest.raises(KeyboardInterrupt), Logs(make_run(), [log]):
        raise KeyboardInterrupt
    assert log.seen == []


def test_courses_are_the_frame_by_replica(compared):
    comparison = compared(seeds=2, lr=[0.1, 0.01])
    found = courses(comparison)
    assert set(found) == set(comparison.study.replicas)
    frame = comparison.frame()
    row = frame[(frame["arm"] == "batch") & (frame["lr"] == 0.01) & (frame["seed"] == 1)]
    row = row[(row["split"] == "validation") & (row["metric"] == "loss")]
    course = found[Replica("batch", 0.01, 1)]
    assert [point.step for point in course] == [100, 200, 300, 400]
    assert [point.values["loss/validation"] for point in course] == list(row["value"])
    times = [time.timestamp() for time in row["time"]]
    assert [point.time for point in course] == pytest.approx(times, rel=0, abs=1e-5)
    assert all(isinstance(point, Point) and len(point.values) == 6 for point in course)


def test_time_goes_on_from_when_the_session_began(compared):
    comparison = compared(seeds=1)
    times = [point.time for point in courses(comparison)[Replica("plain", 0.01, 0)]]
    # The made-up run measures every half second.
    assert [later - times[0] for later in times] == pytest.approx([0, 0.5, 1, 1.5], abs=2e-3)
    assert 0.5 <= times[0] - comparison.started < 1.502  # It began within that second.


@pytest.mark.parametrize(
    ("decays", "replica", "name"),
    [
        ([0], Replica("group:8", 1e-5, 7), "group:8/lr=1e-05/seed=7"),
        ([1e-4], Replica("batch", 0.1, 0, 1e-4), "batch/lr=0.1/weight_decay=0.0001/seed=0"),
        ([0, 1e-4], Replica("batch", 0.1, 0), "batch/lr=0.1/weight_decay=0.0/seed=0"),
    ],
)
def test_replicas_have_names_of_their_own(decays, replica, name):
    assert run_name(Study(weight_decay=decays), replica) == name


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = re.escape("install normlab with its extra parquet, pip install 'normlab[parquet]'")
    with pytest.raises(InputError, match=f"^pyarrow cannot be imported .*: {message}$"):
        require("pyarrow", "parquet")
