import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import closing, contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from normlab.data import load, split
from normlab.errors import InputError, NormlabError
from normlab.networks import build_network
from normlab.training import (
    Choice,
    Engine,
    Measurement,
    Outcome,
    Recipe,
    Replica,
    engine,
    train,
)
from normlab.training.fleet import Fleet

# A thousand images to train on: 31 steps, and most of the time goes into evaluation.
QUICK = Recipe(validation=59000, epochs=1)
LONG = Recipe(validation=59000, epochs=10_000)
PLAIN, BOTH = Replica("plain", 1e-3, 0), Replica("batch+dropout:0.5", 1e-3, 0)


SLOW = pytest.mark.slow


def run_replicas(recipe, replicas, workers=1, **options):
    """With the engine chosen beforehand, so that nothing is timed."""
    chosen = {each.arm: Choice(each.arm, Engine("looped", "traced"), {}) for each in replicas}
    return engine.run_replicas(recipe, replicas, workers, **{"chosen": chosen, **options})


def told(events):
    """Each replica's events in their order, without the time that they took."""
    by_replica = defaultdict(list)
    for event in events:
        by_replica[event.replica].append(event[:3] if isinstance(event, Outcome) else event)
    return dict(by_replica)


def worker_ids():
    return [process.pid for process in multiprocessing.active_children()]


def is_running(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def none_run_within(seconds, process_ids):
    deadline = time.monotonic() + seconds
    while any(map(is_running, process_ids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def at_most(seconds):
    def give_up(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("two_threads")
def test_every_field_of_the_recipe_reaches_its_replicas():
    recipe = Recipe(
        validation=59500,
        scaling="-1..1",
        network="mlp:12",
        activation="tanh",
        init="xavier",
        optimizer="sgd",
        momentum=0.9,
        batch_size=50,
        epochs=2,
        evaluate_every=7,
    )
    replica = Replica("batch", 0.1, 5, 0.01)
    network = build_network(
        "mlp:12", "batch", 5, image_shape=(1, 28, 28), classes=10, activation="tanh", init="xavier"
    )
    torch.set_num_threads(1)
    expected = list(train(network, replica, recipe, split(load("mnist"), 59500)))
    events = list(run_replicas(recipe, [replica]))
    assert [event.step for event in events] == [7, 10, 17, 20, 20]
    assert told(events) == told(expected)


def test_replicas_come_one_after_another_and_one_that_diverges_stops_no_other():
    recipe = QUICK.model_copy(update={"optimizer": "sgd"})
    replicas = [Replica("plain", 10, 0, 1.0), Replica("plain", 1e-3, 0)]
    events = list(run_replicas(recipe, replicas))
    assert [type(event) for event in events] == [Outcome, Measurement, Outcome]
    assert [event.replica for event in events] == [replicas[0], replicas[1], replicas[1]]
    assert [event.status for event in events if isinstance(event, Outcome)] == ["diverged", "done"]


def test_a_replica_gives_the_same_bits_alone_or_after_another_and_leaves_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = told(run_replicas(QUICK, [PLAIN, BOTH]))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    again = told(run_replicas(QUICK, [BOTH]))
    assert first[BOTH] == again[BOTH]
    (other,) = told(run_replicas(QUICK, [BOTH._replace(seed=1)])).values()
    assert other[0].values != again[BOTH][0].values


def test_nothing_is_run_where_there_are_no_replicas():
    assert list(run_replicas(QUICK, [])) == []
    assert list(run_replicas(QUICK, [], workers=4)) == []


@pytest.mark.usefixtures("two_threads")
def test_numbers_do_not_depend_on_the_threads_that_torch_was_set_to():
    two = told(run_replicas(QUICK, [BOTH]))
    torch.set_num_threads(1)
    assert told(run_replicas(QUICK, [BOTH])) == two


@pytest.mark.usefixtures("two_threads")
def test_a_replica_has_one_thread_and_torchs_setting_comes_back():
    events = run_replicas(QUICK, [PLAIN])
    assert torch.get_num_threads() == 2
    assert [torch.get_num_threads() for _ in events] == [1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_torchs_threads_come_back_when_the_iterator_is_closed_early():
    events = run_replicas(LONG, [PLAIN])
    next(events)
    assert torch.get_num_threads() == 1
    events.close()
    assert torch.get_num_threads() == 2
    assert list(events) == []


@pytest.mark.usefixtures("two_threads")
def test_torchs_threads_come_back_when_the_consumer_raises():
    def consume():
        with closing(run_replicas(LONG, [PLAIN])) as events:
            for _ in events:
                raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match="1"):
        consume()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_torchs_threads_come_back_when_a_replica_cannot_be_built():
    with pytest.raises(InputError, match="finds nothing to normalize"):
        list(run_replicas(QUICK, [Replica("instance", 1e-3, 0)]))
    assert torch.get_num_threads() == 2


def test_workers_find_the_same_bits_as_one_process_and_are_gone_afterwards():
    # One more than there are workers, so that one of them trains two in turn.
    replicas = [PLAIN, BOTH, BOTH._replace(seed=1)]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    events, workers = [], set()
    for event in run_replicas(QUICK, replicas, workers=2):
        events.append(event)
        workers.update(worker_ids())
    assert len(workers) == 2
    assert worker_ids() == []
    assert torch.get_rng_state().equal(random)
    assert torch.get_num_threads() == threads
    assert told(events) == told(run_replicas(QUICK, replicas))
    assert sorted(told(events)) == sorted(replicas)


def test_one_replica_starts_no_process():
    with closing(run_replicas(QUICK, [PLAIN], workers=8)) as events:
        next(events)
        assert worker_ids() == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_the_iterator_ends_the_workers():
    events = run_replicas(LONG, [PLAIN, BOTH], workers=2)
    next(events)
    workers = worker_ids()
    assert len(workers) == 2
    assert all(map(is_running, workers))
    try:
        with at_most(seconds=5):
            events.close()
        assert worker_ids() == []
        assert not any(map(is_running, workers))
    finally:
        for process in multiprocessing.active_children():
            process.kill()


@pytest.fixture
def started(monkeypatch):
    """The processes that were started, in their order."""
    started, start = [], SpawnProcess.start

    def start_slowly(process):
        start(process)
        started.append(process.pid)
        time.sleep(0.2)  # CPython's pool then fails to watch the worker that it started last.

    monkeypatch.setattr(SpawnProcess, "start", start_slowly)
    return started


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("killed_at", [1, *(pytest.param(at, marks=SLOW) for at in (2, 4, 7, 11))])
def test_the_work_of_a_worker_that_is_killed_is_done_again(started, tmp_path, killed_at):
    recipe = QUICK.model_copy(update={"epochs": 6})
    events, folder = [], tmp_path / "checkpoints"
    with closing(run_replicas(recipe, [PLAIN, BOTH], workers=2, folder=folder)) as running:
        for event in running:
            events.append(event)
            if len(events) == killed_at:
                os.kill(started[-1], signal.SIGKILL)
    assert len(started) >= 3
    # Not one event is told twice, and none has another value.
    assert told(events) == told(run_replicas(recipe, [PLAIN, BOTH]))
    assert worker_ids() == []
    assert not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.slow
def test_a_second_worker_that_is_killed_is_an_error_that_says_what_to_do(started):
    message = r"two worker processes died.*run the same command again"
    with closing(run_replicas(LONG, [PLAIN, BOTH], workers=2)) as events:
        next(events)
        os.kill(started[-1], signal.SIGKILL)
        while len(started) < 4:
            next(events)
        os.kill(started[-1], signal.SIGKILL)
        with at_most(seconds=20), pytest.raises(NormlabError, match=message):
            for _ in events:
                pass
    assert worker_ids() == []


def test_engines_are_timed_once_and_remembered(monkeypatch):
    recipe = QUICK.model_copy(update={"network": "mlp:9"})
    replicas = [Replica("batch", 1e-3, seed) for seed in range(2)]
    first, *rest = engine.run_replicas(recipe, replicas)
    assert isinstance(first, Choice)
    assert first.arm == "batch"
    assert first.seconds.keys() == {"looped, native", "looped, traced", "stacked, traced"}
    assert first.seconds[str(first.engine)] == min(first.seconds.values()) > 0
    monkeypatch.setattr("normlab.training.fleet.Fleet.time_step", None)  # So it cannot be called.
    again, *same = engine.run_replicas(recipe, replicas)
    assert again == first
    assert told(same) == told(rest)
    (forced, *_) = engine.run_replicas(
        recipe, replicas, chosen={"batch": Choice("batch", Engine("stacked", "traced"), {})}
    )
    assert isinstance(forced, Measurement)


def test_other_kernels_are_timed_anew(monkeypatch, tmp_path):
    replicas = [Replica("batch", 1e-3, seed) for seed in range(2)]
    timings, time_step = [], Fleet.time_step

    def counted(*arguments):
        timings.append(arguments)
        return time_step(*arguments)

    monkeypatch.setattr(Fleet, "time_step", counted)
    for built, times in [(b"one", 3), (b"one", 3), (b"other", 6), (None, 9)]:
        library = tmp_path / "kernels.so"
        library.unlink(missing_ok=True)
        if built is not None:
            library.write_bytes(built)
        monkeypatch.setattr("normlab.training.choice.LIBRARY", library)
        next(iter(engine.run_replicas(QUICK, replicas)))
        assert len(timings) == times


def test_a_kind_that_is_asked_for_is_taken_and_a_finished_replica_is_not_trained():
    replicas = [Replica("batch", 1e-3, seed) for seed in range(3)]
    first, *rest = engine.run_replicas(
        QUICK, replicas, engine="stacked", finished=frozenset(replicas[:1])
    )
    assert first.engine.kind == "stacked"
    assert {event.replica for event in rest} == set(replicas[1:])


def test_normlabs_kernels_do_not_stand_in_for_torchs_layer():
    (first, *_) = engine.run_replicas(QUICK, [Replica("torch-batch", 1e-3, 0)], engine="looped")
    assert first.seconds.keys() == {"looped, traced"}


@SLOW
def test_compiling_is_tried_where_it_pays_and_changes_no_more_than_roundings(monkeypatch):
    # Adam would make a rounding of a gradient that is nothing as large as any other: hence sgd.
    recipe = QUICK.model_copy(update={"network": "mlp:8", "optimizer": "sgd"})
    replicas = [Replica("batch+dropout:0.5", 0.1, seed) for seed in range(2)]
    monkeypatch.setattr("normlab.training.choice._COMPILATION", 0.0)
    (first, *_) = engine.run_replicas(recipe, replicas, engine="looped")
    assert first.seconds.keys() == {"looped, native", "looped, traced", "looped, compiled"}
    compiled = Choice(first.arm, Engine("looped", "compiled"), {})
    fast = told(engine.run_replicas(recipe, replicas, chosen={first.arm: compiled}))
    slow = told(run_replicas(recipe, replicas))
    for replica in replicas:
        measured, expected = fast[replica][0].values, slow[replica][0].values
        assert measured == pytest.approx(expected, abs=1e-4)


class Counts(torch.nn.Module):
    """Does something else at every third step, which no trace can know."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps = torch.nn.Linear(784, 10), 0

    def forward(self, x):
        self.steps += self.training
        return self.linear(x.flatten(1)) * (1 + self.steps % 3)


def test_a_network_whose_trace_does_something_else_is_trained_by_the_module_itself(monkeypatch):
    monkeypatch.setattr("normlab.training.engine.build", lambda *_, **__: Counts())
    recipe = QUICK.model_copy(update={"network": "mlp:7"})
    first, *_ = engine.run_replicas(recipe, [Replica("plain", 1e-3, seed) for seed in range(2)])
    assert first.engine == Engine("looped", "eager")


def test_an_error_in_a_worker_is_the_callers_however_busy_the_other_workers_are():
    # The first replica soon makes room for the one that cannot be built, beside one that goes on.
    recipe = LONG.model_copy(update={"optimizer": "sgd"})
    first, second = PLAIN._replace(lr=10, weight_decay=1.0), PLAIN._replace(arm="batch")
    replicas = [first, second, PLAIN._replace(arm="instance")]
    events, seen = run_replicas(recipe, replicas, workers=2), []
    with closing(events):
        seen.append(next(events))
        with at_most(seconds=20), pytest.raises(InputError, match="arm 'instance' finds nothing"):
            seen.extend(events)
    assert worker_ids() == []
    assert [e[:2] for e in seen if isinstance(e, Outcome)] == [(replicas[0], "diverged")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing
            from normlab.training import Choice, Engine, Measurement, Recipe, Replica, run_replicas

            if __name__ == "__main__":
                recipe = Recipe(validation=59000, epochs=10_000)
                replicas = [Replica("plain", 1e-3, seed) for seed in (0, 1)]
                chosen = {"plain": Choice("plain", Engine("looped", "traced"), {})}
                events = run_replicas(recipe, replicas, workers=2, chosen=chosen)
                while not isinstance(next(events), Measurement):
                    pass
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                for _ in events:
                    pass
            """
        )
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    try:
        assert len(workers) == 2
        assert none_run_within(10, workers)
    finally:
        for process_id in filter(is_running, workers):
            os.kill(process_id, signal.SIGKILL)
