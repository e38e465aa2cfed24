"""MLflow: a run for the study, and under it a run for each replica."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from normlab.errors import InputError, NormlabError
from normlab.report.logs import Point, courses, ends, finals, require, run_name
from normlab.report.wording import headline
from normlab.study import Comparison

__all__ = ["Mlflow"]

_BATCH = 800  # Metrics in one request; with parameters and tags a server takes 1,000 entries.
_SETTINGS = {
    # MLflow's own patience with a server that does not answer is minutes, in which nothing trains.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # It would print a line for every run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LEDGER, _REPLICA = "normlab.ledger", "normlab.replica"
_STEP, _STATUS = "normlab.step", "normlab.status"


@dataclass
class _Run:
    """What is known of a run of MLflow's.

    Attributes:
        id: MLflow's.
        step: The last one whose metrics it has; None before the first.
        status: How what it shows ended; nothing before that.
        is_open: Whether MLflow takes it for running.
    """

    id: str
    step: int | None = None
    status: str = ""
    is_open: bool = True


class Mlflow:
    """An experiment of MLflow's, named as the study.

    The study's run has its fields as parameters and, once it is complete, the differences between
    the arms as metrics and the verdict as its description. Each replica's run has arm, learning
    rate, seed and weight decay as parameters, and as metrics what was measured, such as
    `accuracy/test`, and the numbers that it ended with.

    Runs are found again by their tags, so that a study that goes on or is exported twice is there
    once.

    Args:
        uri: Where MLflow keeps its runs; its own setting (`MLFLOW_TRACKING_URI`) if none is given.

    Raises:
        InputError: MLflow is not installed, or cannot be used there.
    """

    name = "mlflow"

    def __init__(self, uri: str | None = None) -> None:
        require("mlflow", "mlflow")
        import mlflow

        uri = uri or mlflow.get_tracking_uri()
        self.out = _without_password(uri)
        with self._in_one_line(InputError):
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)
        self._experiment = ""
        self._runs: dict[str, _Run] = {}

    def write(self, comparison: Comparison) -> None:
        """Bring the runs up to what the comparison says.

        Raises:
            NormlabError: MLflow cannot be reached, or does not take it.
        """
        if comparison.sessions:
            with self._in_one_line(NormlabError):
                self._write(comparison)

    def _write(self, comparison: Comparison) -> None:
        study, sessions = comparison.study, comparison.sessions
        # The same study run in another folder is another run.
        ledger = {_LEDGER: f"{study.fingerprint} {sessions[0]['started']}"}
        if not self._experiment:
            self._find(study.name, ledger[_LEDGER])
        begun = comparison.started
        whole = self._open(study.name, ledger | {_REPLICA: "all"}, begun)
        if whole.step is None:
            fields = study.model_dump(mode="json", exclude={"published", "protocol"})
            self._log(whole, [], fields, {_STEP: "0"})
            whole.step = 0
        self._write_replicas(comparison, ledger | {"mlflow.parentRunId": whole.id}, begun)
        if comparison.complete and whole.is_open:
            ended = max((course[-1].time for course in courses(comparison).values()), default=begun)
            said = {"mlflow.note.content": " ".join(headline(comparison)), _STATUS: "done"}
            self._log(whole, [Point(0, ended, _differences(comparison))], {}, said)
            self._close(whole, "done", ended)

    def _write_replicas(self, comparison: Comparison, tags: dict[str, str], begun: float) -> None:
        points, ended = courses(comparison), ends(comparison)
        for replica in comparison.study.replicas:
            course, end = points.get(replica, []), ended.get(replica)
            name = run_name(comparison.study, replica)
            if not course and not end:
                continue
            # One that diverged at once has no measurement to take the time from.
            first, last = (course[0].time, course[-1].time) if course else (begun, begun)
            run = self._open(name, {**tags, _REPLICA: name}, first)
            if not run.is_open:
                continue
            fields = replica._asdict() if run.step is None else {}
            new = [point for point in course if run.step is None or point.step > run.step]
            said = {_STEP: str(new[-1].step)} if new else {}
            if end and not run.status:
                new.append(Point(end["step"], last, finals(comparison, end)))
                said |= {_STATUS: end["status"]}
            if new:
                self._log(run, new, fields, said)
                run.step, run.status = new[-1].step, said.get(_STATUS, "")
            if end:
                self._close(run, end["status"], last)

    def _find(self, experiment: str, ledger: str) -> None:
        """Find the runs of a ledger, and make the experiment if it is not there."""
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [number], f"tags.`{_LEDGER}` = '{ledger}'", page_token=token
            )
            for run in page:
                tags, step = run.data.tags, run.data.tags.get(_STEP)
                self._runs[tags[_REPLICA]] = _Run(
                    run.info.run_id,
                    None if step is None else int(step),
                    tags.get(_STATUS, ""),
                    run.info.status == "RUNNING",
                )
            token = page.token
            if not token:
                break
        self._experiment = number

    def _open(self, name: str, tags: dict[str, str], begun: float) -> _Run:
        """Return a run, and make it if it is not there."""
        key = tags[_REPLICA]
        if key not in self._runs:
            made = self._client.create_run(self._experiment, _milliseconds(begun), tags, name)
            self._runs[key] = _Run(made.info.run_id)
        return self._runs[key]

    def _log(
        self, run: _Run, course: Sequence[Point], fields: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Send what is new of a run.

        The tags, which say what is there, go last, so that what is not there is sent again.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(tag, value, _milliseconds(point.time), point.step)
            for point in course
            for tag, value in point.values.items()
        ]
        while len(metrics) > _BATCH:
            self._client.log_batch(run.id, metrics[:_BATCH])
            metrics = metrics[_BATCH:]
        texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in fields.items()}
        self._client.log_batch(
            run.id,
            metrics,
            [Param(key, text) for key, text in texts.items()],
            [RunTag(key, text) for key, text in tags.items()],
        )

    def _close(self, run: _Run, status: str, ended: float) -> None:
        word = "FINISHED" if status == "done" else "FAILED"
        self._client.set_terminated(run.id, word, _milliseconds(ended))
        run.is_open = False

    @contextmanager
    def _in_one_line(self, kind: type[NormlabError]) -> Iterator[None]:
        """Turn whatever MLflow and the packages below it raise into one line."""
        mine = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ.update(mine)
        try:
            yield
        except Exception as error:
            said = textwrap.shorten(_without_password(str(error)), 400, placeholder=" …")
            raise kind(f"{self.out}: MLflow cannot be used there: {said}") from None
        finally:
            for name in mine:
                del os.environ[name]


def _differences(comparison: Comparison) -> dict[str, float]:
    """Return what the arms' verdicts rest on, by names that MLflow takes."""
    found = {}
    for verdict in comparison.verdicts:
        low, high = verdict.interval or (None, None)
        numbers = {"difference": verdict.difference, "low": low, "high": high}
        for name, value in {**numbers, "p_holm": verdict.p_holm}.items():
            if value is not None:
                arm = re.sub(r"[^\w.: -]", "_", verdict.arm)
                found[f"{verdict.metric.name}/{arm}/{name}"] = value
    return found


def _without_password(text: str) -> str:
    """Return a text that may be shown: its addresses without the user's name and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
