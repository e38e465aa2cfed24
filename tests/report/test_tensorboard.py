import shutil
from itertools import product

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.util.tensor_util import make_ndarray

from normlab.errors import NormlabError
from normlab.report import Logs, TensorBoard
from normlab.report.logs import courses, ends, finals, run_name
from normlab.study import Comparison, Study, run
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Replica

SPLITS = ("train", "validation", "test")
TINY = Study(network="mlp:8", arms=["plain", "batch"], validation=59_000, seeds=2, epochs=2)


def runs(folder):
    """The names of the runs that TensorBoard would show."""
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("*tfevents*")}


def read(folder, name):
    """A run as TensorBoard's own reader shows it."""
    reader = EventAccumulator(str(folder / name), size_guidance={"scalars": 0, "tensors": 0})
    return reader.Reload()


def scalars(folder, name, tag):
    return [(each.step, each.value) for each in read(folder, name).Scalars(tag)]


def histograms(reader):
    """By tag, the step, the ends and the counts of every histogram."""
    found = {}
    for tag in reader.Tags()["tensors"]:
        if reader.SummaryMetadata(tag).plugin_data.plugin_name != "histograms":
            continue
        for each in reader.Tensors(tag):
            left, right, counts = make_ndarray(each.tensor_proto).T
            assert np.allclose(left[1:], right[:-1])
            found.setdefault(tag, []).append((each.step, left[0], right[-1], counts.tolist()))
    return found


def float32(pairs):
    """What TensorBoard keeps of numbers."""
    return [(step, float(np.float32(value))) for step, value in pairs]


def plugin(folder, name, tag):
    """What a run tells the table of hyperparameters."""
    found = read(folder, name).SummaryMetadata(tag).plugin_data.content
    return {
        metadata.EXPERIMENT_TAG: metadata.parse_experiment_plugin_data,
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
        metadata.SESSION_END_INFO_TAG: metadata.parse_session_end_info_plugin_data,
    }[tag](found)


def assert_says_what_the_ledger_says(folder, comparison):
    """The scalars of every replica, and of every arm's mean and interval, are the ledger's."""
    points, study = courses(comparison), comparison.study
    for replica, course in points.items():
        reader = read(folder, run_name(study, replica))
        for tag in (f"{metric}/{split}" for metric in ("loss", "accuracy") for split in SPLITS):
            found = reader.Scalars(tag)
            expected = [(point.step, point.values[tag]) for point in course]
            assert [(each.step, each.value) for each in found] == float32(expected)
            assert [each.wall_time for each in found] == [point.time for point in course]
        expected = {}
        for row in comparison.histograms().itertuples():
            if replica == (row.arm, row.lr, row.seed, row.weight_decay):
                seen = expected.setdefault(f"{row.name}/{row.layer}", [])
                seen.append((row.step, row.low, row.high, row.counts))
        assert histograms(reader) == expected
    names = {run_name(study, replica) for replica in points}
    for metric in ("loss", "accuracy"):
        for (arm, split), curve in comparison.curves(metric).groupby(["arm", "split"]):
            for end in ("mean", "low", "high"):
                expected = float32(curve[["step", end]].dropna().itertuples(index=False))
                if expected:
                    assert scalars(folder, f"{arm}/{end}", f"{metric}/{split}") == expected
                    names.add(f"{arm}/{end}")
    assert runs(folder) == names


@pytest.fixture
def written(compared, tmp_path):
    """Writes a made-up run, and returns the folder and the comparison."""

    def write(**options):
        comparison = compared(**options)
        TensorBoard(tmp_path).write(comparison)
        return tmp_path, comparison

    return write


def test_every_number_is_the_ledgers(written):
    assert_says_what_the_ledger_says(*written(seeds=3))


def test_what_probes_read_is_in_each_replicas_run(written):
    folder, comparison = written(seeds=2, probes=["smoothness", "units"], evaluate_every=50)
    assert_says_what_the_ledger_says(folder, comparison)
    read_by = comparison.probes().groupby(["arm", "seed", "probe", "layer", "name"])
    assert len(read_by) == 2 * 2 * 6
    for (arm, seed, probe, layer, name), course in read_by:
        tag = f"{probe}/{layer}/{name}" if layer else f"{probe}/{name}"
        found = read(folder, f"{arm}/lr=0.01/seed={seed}").Scalars(tag)
        steps = [(each.step, each.value) for each in found]
        assert steps == float32(zip(course["step"], course["value"], strict=True))
        points = courses(comparison)[Replica(arm, 0.01, seed)]
        times = {0: points[0].time} | {point.step: point.time for point in points}
        assert [each.wall_time for each in found] == [times[step] for step in course["step"]]


def test_a_replica_that_diverged_or_has_not_ended_is_in_no_band(written):
    folder, comparison = written(
        seeds=4,
        diverged=lambda one: one == Replica("plain", 0.01, 3),
        running=lambda one: one == Replica("batch", 0.01, 3),
    )
    assert_says_what_the_ledger_says(folder, comparison)
    done = [courses(comparison)[Replica("plain", 0.01, seed)] for seed in range(3)]
    mean = np.mean([course[-1].values["accuracy/test"] for course in done])
    found = read(folder, "plain/mean").Scalars("accuracy/test")
    assert found[-1].value == pytest.approx(mean, rel=1e-6)
    # A mean is as late as the last measurement in it.
    assert [each.wall_time for each in found] == [point.time for point in done[-1]]


def test_one_seed_has_a_mean_and_no_interval(written):
    folder, _ = written(seeds=1)
    names = {f"{arm}/{name}" for arm in ("plain", "batch") for name in ("mean", "lr=0.01/seed=0")}
    assert runs(folder) == names


def test_several_settings_have_bands_of_their_own(written):
    folder, comparison = written(seeds=2, lr=[0.1, 0.01], weight_decay=[0, 1e-4])
    curves = comparison.curves("accuracy")
    for (lr, decay), curve in curves[curves["arm"] == "batch"].groupby(["lr", "weight_decay"]):
        name = f"batch/lr={lr}/weight_decay={decay}/high"
        expected = curve.loc[curve["split"] == "test", ["step", "high"]]
        found = scalars(folder, name, "accuracy/test")
        assert found == float32(expected.itertuples(index=False))


def test_the_table_of_hyperparameters_has_every_replica_and_how_it_ended(written):
    study = {"seeds": 2, "lr": [0.1, 0.01], "weight_decay": 1e-4}
    bad = Replica("plain", 0.1, 1, 1e-4)
    folder, comparison = written(**study, diverged=lambda one: one == bad)
    for replica, end in ends(comparison).items():
        name = run_name(comparison.study, replica)
        start = plugin(folder, name, metadata.SESSION_START_INFO_TAG)
        assert start.group_name == name
        given = {key: value.WhichOneof("kind") for key, value in start.hparams.items()}
        numbers = dict.fromkeys(("lr", "seed", "weight_decay"), "number_value")
        assert given == {"arm": "string_value", **numbers}
        found = {key: getattr(start.hparams[key], kind) for key, kind in given.items()}
        assert found == replica._asdict()
        status = plugin(folder, name, metadata.SESSION_END_INFO_TAG).status
        assert status == (Status.STATUS_FAILURE if replica == bad else Status.STATUS_SUCCESS)
        shown = {tag for tag in read(folder, name).Tags()["scalars"] if tag.startswith("hparam/")}
        numbers = finals(comparison, end)
        assert shown == {f"hparam/{key}" for key in numbers}
        assert bool(shown) == (replica != bad)
        for key, value in numbers.items():
            assert scalars(folder, name, f"hparam/{key}") == float32([(end["step"], value)])
    experiment = plugin(folder, name, metadata.EXPERIMENT_TAG)
    assert {each.name for each in experiment.hparam_infos} == set(Replica._fields)
    assert [each.name.tag for each in experiment.metric_infos] == [
        f"hparam/{metric.name}" for metric in comparison.metrics
    ]


def test_a_replica_that_diverged_at_once_is_shown_as_failed(tmp_path):
    replica = TINY.replicas[0]
    with Ledger.write(tmp_path, TINY) as ledger:
        ledger.begin_session(workers=1)
        ledger.add(Outcome(replica, "diverged", 31, 1.0), seconds=1.0)
    TensorBoard(tmp_path / "log").write(Comparison(tmp_path))
    (name,) = runs(tmp_path / "log")
    end = plugin(tmp_path / "log", name, metadata.SESSION_END_INFO_TAG)
    assert (name, end.status) == ("plain/lr=0.01/seed=0", Status.STATUS_FAILURE)


def test_a_run_without_measurements_writes_nothing(written):
    folder, _ = written(missing=lambda _: True)
    assert list(folder.iterdir()) == []


def test_what_is_new_is_appended_and_a_mean_that_changed_gets_a_new_file(tmp_path):
    """One file would not do: TensorBoard does not read again what it has read."""
    log, folder = TensorBoard(tmp_path / "log"), tmp_path / "log"
    first, second = (Replica("plain", 0.01, seed) for seed in (0, 1))
    files = {}

    def add(*events):
        for event in events:
            ledger.add(event, seconds=1.0)
        log.write(Comparison(tmp_path))
        found = {str(path.parent.relative_to(folder)): path for path in folder.rglob("*tfevents*")}
        assert len(found) == len(list(folder.rglob("*tfevents*")))
        changed = {name for name, path in found.items() if files.get(name) != path}
        files.update(found)
        return changed

    def measured(replica, step):
        keys = product(SPLITS, ("loss", "accuracy"))
        return Measurement(replica, step, 1, dict.fromkeys(keys, step / 1e4 + replica.seed))

    with Ledger.write(tmp_path, TINY) as ledger:
        ledger.begin_session(workers=1)
        assert add() == set()
        assert add(measured(first, 100)) == {"plain/lr=0.01/seed=0"}
        assert add(measured(first, 200)) == set()
        assert add(Outcome(first, "done", 200, 1.0)) == {"plain/mean"}
        assert add(measured(second, 100), measured(second, 200)) == {"plain/lr=0.01/seed=1"}
        new = {"plain/mean", "plain/low", "plain/high"}
        assert add(Outcome(second, "done", 200, 1.0)) == new
    assert_says_what_the_ledger_says(folder, Comparison(tmp_path))


class Stops:
    """Ends a run after some events, as Ctrl-C does."""

    def __init__(self, events):
        self.left = events

    def begin(self, *_):
        pass

    def __call__(self, _):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def train(folder, display=None):
    with Logs(folder, [TensorBoard(folder / "log")], display) as logs:
        run(TINY, folder, engine="looped", watcher=logs)


@pytest.mark.parametrize("events", [4, 10])
def test_a_run_that_goes_on_has_every_point_once(tmp_path, monkeypatch, events):
    monkeypatch.setattr("normlab.report.logs._SHARE", 1e9)  # After every event.
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Stops(events))
    assert runs(tmp_path / "log")
    train(tmp_path)
    assert_says_what_the_ledger_says(tmp_path / "log", Comparison(tmp_path))
    assert Comparison(tmp_path).complete


def test_what_an_earlier_writer_left_is_replaced_and_other_files_are_not(compared, tmp_path):
    TensorBoard(tmp_path).write(compared(seeds=2))
    other = tmp_path / "batch" / "mean" / "events.out.tfevents.1.elsewhere"
    shutil.copy(next(other.parent.iterdir()), other)
    comparison = compared(seeds=2, missing=lambda one: one == Replica("plain", 0.01, 1))
    TensorBoard(tmp_path).write(comparison)
    assert not list((tmp_path / "plain" / "lr=0.01" / "seed=1").iterdir())
    assert not list((tmp_path / "plain" / "low").iterdir())
    assert len(list(other.parent.iterdir())) == 2
    other.unlink()
    assert_says_what_the_ledger_says(tmp_path, comparison)


def test_logging_changes_no_number(tmp_path):
    run(TINY, tmp_path / "without", engine="looped")
    train(tmp_path / "with")
    one, other = (Comparison(tmp_path / name).frame() for name in ("without", "with"))
    assert one.drop(columns="time").equals(other.drop(columns="time"))


def test_a_disk_that_is_full_is_one_line(compared, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with pytest.raises(NormlabError, match=r"files cannot be written: No space left on device$"):
        TensorBoard(tmp_path).write(compared(seeds=2))
