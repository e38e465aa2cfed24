"""TensorBoard: event files of every replica, and of every arm's mean with its band."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normlab.errors import NormlabError
from normlab.report.logs import (
    Point,
    courses,
    ends,
    finals,
    require,
    run_name,
    setting_name,
)
from normlab.study import Comparison, Study
from normlab.training import Replica

__all__ = ["TensorBoard"]

_FILE = "events.out.tfevents.{}.normlab"  # TensorBoard reads a run's files in order of their names.
_BAND = ("mean", "low", "high")


class TensorBoard:
    """A folder of event files.

    A run of TensorBoard's for each replica, such as `batch/lr=0.01/seed=3`, with its scalars, its
    histograms (`output/LAYER`, and of norm layers `weight/LAYER` and `bias/LAYER`), what probes
    read (`PROBE/LAYER/NAME`, or `PROBE/NAME` of the whole network), its hyperparameters, and when
    it has ended the numbers that it ended with; and three for each arm,
    such as `batch/mean`, `batch/low` and `batch/high`, with the mean over the seeds that finished
    and the ends of its interval, as `Comparison.curves` gives them.

    Args:
        folder: To write to; made when there is something to write.

    Raises:
        InputError: TensorBoard is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "tensorboard")
        self.out = str(folder)
        self._folder = folder
        self._written: dict[str, tuple[Path, list[bytes]]] = {}

    def write(self, comparison: Comparison) -> None:
        """Bring the files up to what the comparison says.

        A new writer begins new files, and takes away what an earlier one wrote for this study.

        Raises:
            NormlabError: The folder cannot be written.
        """
        runs = _runs(comparison)
        try:
            for run, records in runs.items():
                self._bring_up(run, records)
            for run in _names(comparison.study):
                if run not in runs:
                    _remove(self._folder / run)
        except OSError as error:
            raise NormlabError(
                f"{self._folder}: TensorBoard's files cannot be written: {error.strerror}"
            ) from None

    def _bring_up(self, run: str, records: list[bytes]) -> None:
        """Append what is new; where that is not all, the run gets a new file.

        A file that TensorBoard has open would not be read again, so it is not replaced by one of
        the same name.
        """
        folder = self._folder / run
        path, written = self._written.get(run, (None, []))
        if path is not None and records[: len(written)] == written:
            _append(path, records[len(written) :])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _FILE.format(time.time_ns())
            _append(path, records)
            _remove(folder, but=path)
        self._written[run] = path, records


def _append(path: Path, records: list[bytes]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("ab") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)


def _remove(folder: Path, but: Path | None = None) -> None:
    """Take away the event files that normlab wrote in a run's folder, and no others."""
    for path in folder.glob(_FILE.format("*")):
        if path != but:
            path.unlink()


def _names(study: Study) -> Iterator[str]:
    """Yield the name of every run that a study may have."""
    for replica in study.replicas:
        yield run_name(study, replica)
        yield from (f"{_band_name(study, replica)}/{end}" for end in _BAND)


def _band_name(study: Study, replica: Replica) -> str:
    if len(study.settings) == 1:
        return replica.arm
    return f"{replica.arm}/{setting_name(study, replica.setting)}"


def _runs(comparison: Comparison) -> dict[str, list[bytes]]:
    """Return the records of every run that has something to show."""
    points, ended = courses(comparison), ends(comparison)
    runs = dict(_bands(comparison, points, ended))
    histograms, readings = _histograms(comparison), _readings(comparison)
    for replica in comparison.study.replicas:
        course, end = points.get(replica, []), ended.get(replica)
        if course or end:
            name = run_name(comparison.study, replica)
            inside = histograms[replica], readings[replica]
            runs[name] = _replica(comparison, replica, course, *inside, end)
    return runs


def _bands(
    comparison: Comparison,
    points: Mapping[Replica, Sequence[Point]],
    ended: Mapping[Replica, Mapping[str, Any]],
) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the name and the records of each arm's mean and of the ends of its interval."""
    import pandas as pd

    done = [replica for replica, end in ended.items() if end["status"] == "done"]
    curves = pd.concat(
        [comparison.curves(metric).assign(metric=metric) for metric in ("accuracy", "loss")]
    )
    for (arm, *setting), group in curves.groupby(["arm", "lr", "weight_decay"], sort=False):
        mine = [one for one in done if (one.arm, *one.setting) == (arm, *setting)]
        times: dict[int, float] = {}
        for point in (point for one in mine for point in points[one]):
            times[point.step] = max(point.time, times.get(point.step, point.time))
        for end in _BAND:
            course = [
                Point(step, times[step], dict(zip(rows["tag"], rows[end], strict=True)))
                for step, rows in group.assign(tag=group["metric"] + "/" + group["split"])
                .dropna(subset=[end])
                .groupby("step")
            ]
            if course:
                name = f"{_band_name(comparison.study, mine[0])}/{end}"
                yield name, [_version(course[0].time), *map(_scalars, course)]


def _replica(
    comparison: Comparison,
    replica: Replica,
    course: Sequence[Point],
    histograms: Mapping[int, Any],
    readings: Mapping[int, dict[str, float]],
    end: Mapping[str, Any] | None,
) -> list[bytes]:
    """Return the records of a replica; histograms are summaries, and readings numbers, by step."""
    from tensorboard.plugins.hparams import summary_v2

    # One that diverged at once has no measurement to take the time from.
    begun = course[0].time if course else comparison.started
    name = run_name(comparison.study, replica)
    start = summary_v2.hparams_pb(replica._asdict(), name, begun)
    records = [
        _version(begun),
        _record(begun, summary=_experiment(comparison)),
        _record(begun, summary=start),
    ]
    points, now = {point.step: point for point in course}, begun
    for step in sorted({*points, *readings}):
        if step in points:
            now = points[step].time
            records.append(_scalars(points[step]))
        if step in histograms:
            records.append(_record(now, step=step, summary=histograms[step]))
        if step in readings:  # Its time is not kept: it is that of the measurement before it.
            records.append(_scalars(Point(step, now, readings[step])))
    if end:
        last = course[-1].time if course else begun
        numbers = {f"hparam/{name}": value for name, value in finals(comparison, end).items()}
        records.append(_scalars(Point(end["step"], last, numbers)))
        records.append(_record(last, summary=_session_end(end["status"], last)))
    return records


def _experiment(comparison: Comparison) -> Any:
    """Return the columns of the table of hyperparameters."""
    from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, Metric, hparams_config_pb

    study = comparison.study
    parameters = [
        HParam("arm", Discrete(study.arms)),
        HParam("lr", Discrete(study.lr)),
        HParam("weight_decay", Discrete(study.weight_decay)),
        HParam("seed"),
    ]
    metrics = [Metric(f"hparam/{one.name}", display_name=one.label) for one in comparison.metrics]
    return hparams_config_pb(parameters, metrics, time_created_secs=comparison.started)


def _session_end(status: str, when: float) -> Any:
    """Return how the table of hyperparameters is told that a replica has ended, and how."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    word = Status.Value("STATUS_SUCCESS" if status == "done" else "STATUS_FAILURE")
    info = HParamsPluginData(session_end_info=SessionEndInfo(status=word, end_time_secs=when))
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(info),
        tensor=metadata.NULL_TENSOR,
    )
    return Summary(value=[value])


def _histograms(comparison: Comparison) -> dict[Replica, dict[int, Any]]:
    """Return each replica's summaries of histograms, by step."""
    import numpy as np
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.histogram.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    metadata = create_summary_metadata(display_name=None, description=None)
    found: dict[Replica, dict[int, Any]] = defaultdict(dict)
    for row in comparison.histograms().to_dict("records"):
        steps = found[Replica(*(row[name] for name in Replica._fields))]
        edges = np.linspace(row["low"], row["high"], len(row["counts"]) + 1)
        buckets = np.stack([edges[:-1], edges[1:], row["counts"]], axis=1)
        steps.setdefault(row["step"], Summary()).value.add(
            tag=f"{row['name']}/{row['layer']}",
            metadata=metadata,
            tensor=make_tensor_proto(buckets),
        )
    return found


def _readings(comparison: Comparison) -> dict[Replica, dict[int, dict[str, float]]]:
    """Return what the probes of each replica read, by step and tag."""
    found: dict[Replica, dict[int, dict[str, float]]] = defaultdict(dict)
    for row in comparison.probes().to_dict("records"):
        replica = Replica(*(row[name] for name in Replica._fields))
        tag = "/".join(filter(None, (row["probe"], row["layer"], row["name"])))
        found[replica].setdefault(row["step"], {})[tag] = row["value"]
    return found


def _scalars(point: Point) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
    return _record(point.time, step=point.step, summary=Summary(value=values))


def _version(when: float) -> bytes:
    """Return the record that every event file begins with."""
    return _record(when, file_version="brain.Event:2")


def _record(when: float, **content: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    record: bytes = Event(wall_time=when, **content).SerializeToString()
    return record
