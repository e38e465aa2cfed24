import os

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from normlab.errors import InputError, NormlabError
from normlab.report import Mlflow, headline
from normlab.report.logs import courses, ends, finals, run_name
from normlab.study import Comparison, Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Replica

# SQLAlchemy's own, about MLflow's use of it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture(scope="module", autouse=True)
def _at_home():
    """MLflow tells its makers nothing of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A store without a server. Making one takes seconds, so the tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def read(uri):
    """What MLflow's own client finds of a comparison: its study's run and its replicas' by name."""

    def find(comparison):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(comparison.study.name)
        found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
        (parent,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
        children = [run for run in found if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
        named = {run.info.run_name: run for run in children}
        assert len(named) == len(children)
        return parent, named

    return find


def assert_says_what_the_ledger_says(uri, comparison, children):
    client = MlflowClient(tracking_uri=uri)
    points, ended = courses(comparison), ends(comparison)
    assert set(children) == {run_name(comparison.study, replica) for replica in {*points, *ended}}
    for replica, course in points.items():
        run, end = children[run_name(comparison.study, replica)], ended.get(replica)
        for tag in course[0].values:
            history = client.get_metric_history(run.info.run_id, tag)
            found = sorted((each.step, each.value, each.timestamp) for each in history)
            expected = [(one.step, one.values[tag], round(one.time * 1000)) for one in course]
            assert found == expected
        numbers = finals(comparison, end) if end else {}
        assert run.data.metrics == {**course[-1].values, **numbers}
        assert run.data.params == {key: str(value) for key, value in replica._asdict().items()}
        word = {"done": "FINISHED", "diverged": "FAILED"}[end["status"]] if end else "RUNNING"
        assert run.info.status == word
        assert run.info.start_time == round(course[0].time * 1000)
        assert run.info.end_time == (round(course[-1].time * 1000) if end else None)


def test_every_replica_has_a_run_under_the_studys(uri, read, compared):
    comparison = compared(name="whole", seeds=5, arms=["plain", "batch+dropout:0.5"])
    Mlflow(uri).write(comparison)
    parent, children = read(comparison)
    assert_says_what_the_ledger_says(uri, comparison, children)
    assert len(children) == 10
    assert (parent.info.run_name, parent.info.status) == ("whole", "FINISHED")
    assert parent.data.tags["mlflow.note.content"] == " ".join(headline(comparison))
    declared = comparison.study.model_dump(mode="json", exclude={"published", "protocol"})
    assert set(parent.data.params) == set(declared)
    assert parent.data.params["arms"] == '["plain", "batch+dropout:0.5"]'
    assert parent.data.params["network"] == "mlp:32"
    (low, high), verdict = comparison.verdicts[0].interval, comparison.verdicts[0]
    numbers = {"difference": verdict.difference, "low": low, "high": high, "p_holm": verdict.p_holm}
    prefix = "final_test_accuracy/batch_dropout:0.5"  # MLflow takes no plus in a name.
    assert {name: parent.data.metrics[f"{prefix}/{name}"] for name in numbers} == numbers


def test_what_diverged_has_failed_and_what_has_not_ended_runs(uri, read, compared):
    comparison = compared(
        name="troubled",
        seeds=3,
        diverged=lambda one: one == Replica("plain", 0.01, 1),
        running=lambda one: one == Replica("batch", 0.01, 2),
        missing=lambda one: one == Replica("plain", 0.01, 2),
    )
    Mlflow(uri).write(comparison)
    parent, children = read(comparison)
    assert_says_what_the_ledger_says(uri, comparison, children)
    assert parent.info.status == "RUNNING"
    assert parent.data.metrics == {}


def test_a_replica_that_diverged_at_once_has_failed(uri, read, tmp_path):
    study = Study(name="at-once", arms="plain", seeds=1)
    with Ledger.write(tmp_path, study) as ledger:
        ledger.begin_session(workers=1)
        ledger.add(Outcome(study.replicas[0], "diverged", 31, 1.0), seconds=1.0)
    Mlflow(uri).write(Comparison(tmp_path))
    parent, children = read(Comparison(tmp_path))
    assert [run.info.status for run in children.values()] == ["FAILED"]
    assert parent.info.status == "FINISHED"


def test_going_on_adds_what_is_new_and_nothing_twice(uri, read, tmp_path):
    study = Study(name="goes-on", arms="plain", seeds=2)
    first, second = study.replicas

    def measured(replica, step):
        return Measurement(replica, step, 1, {("test", "loss"): step, ("test", "accuracy"): 0.5})

    def session(log, *events):
        with Ledger.write(tmp_path, study) as ledger:
            ledger.begin_session(workers=1)
            for event in events:
                ledger.add(event, seconds=1.0)
                log.write(Comparison(tmp_path))

    with Ledger.write(tmp_path, study):
        pass
    log = Mlflow(uri)
    log.write(Comparison(tmp_path))  # Of a run that has not begun there is nothing to say.
    ended = Outcome(first, "done", 2, 1.0)
    session(log, measured(first, 1), measured(first, 2), ended, measured(second, 1))
    # The second had not ended: the ledger drops what it measured, and it is made again.
    session(Mlflow(uri), measured(second, 1), measured(second, 2), Outcome(second, "done", 2, 1.0))
    Mlflow(uri).write(Comparison(tmp_path))
    _, children = read(Comparison(tmp_path))
    client = MlflowClient(tracking_uri=uri)
    for replica in study.replicas:
        run = children[run_name(study, replica)]
        history = client.get_metric_history(run.info.run_id, "loss/test")
        assert sorted((each.step, each.value) for each in history) == [(1, 1.0), (2, 2.0)]
        assert len(client.get_metric_history(run.info.run_id, "final_test_loss")) == 1
        assert run.info.status == "FINISHED"


def test_what_is_there_is_found_page_by_page_and_not_sent_again(uri, compared, monkeypatch):
    comparison, find = compared(name="pages", seeds=3), MlflowClient.search_runs
    Mlflow(uri).write(comparison)

    def refused(*_, **__):
        raise AssertionError("there is nothing to send")

    for name in ("create_run", "log_batch", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, refused)
    small = {"max_results": 2}
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **b: find(*a, **{**b, **small}))
    Mlflow(uri).write(comparison)


def test_a_run_that_was_not_closed_is_closed_later(uri, read, compared, monkeypatch):
    comparison = compared(name="unclosed", seeds=1, arms="plain")

    def gone(*_, **__):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", gone)
        with pytest.raises(NormlabError, match="gone"):
            Mlflow(uri).write(comparison)
    sent, send = [], MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda *a, **b: (sent.append(a[1]), send(*a, **b))
    )
    Mlflow(uri).write(comparison)
    parent, children = read(comparison)
    assert_says_what_the_ledger_says(uri, comparison, children)
    assert sent == [parent.info.run_id]  # The replica's run has everything; it was only open.


def test_the_same_study_in_another_folder_is_another_run(uri, make_run, monkeypatch):
    client = MlflowClient(tracking_uri=uri)
    for moment in ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"):
        comparison = Comparison(make_run(name="twice", seeds=1))
        monkeypatch.setitem(comparison.sessions[0], "started", moment)
        for _ in range(2):
            Mlflow(uri).write(comparison)
    experiment = client.get_experiment_by_name("twice")
    assert len(client.search_runs([experiment.experiment_id])) == 2 * (1 + 2)


def test_metrics_are_sent_in_batches(uri, compared, read, monkeypatch):
    sizes, send = [], MlflowClient.log_batch

    def log_batch(self, run_id, metrics=(), params=(), tags=(), **options):
        sizes.append(len(metrics) + len(params) + len(tags))
        return send(self, run_id, metrics, params, tags, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    comparison = compared(name="long", seeds=1, arms="plain", epochs=3, evaluate_every=1)
    Mlflow(uri).write(comparison)
    assert_says_what_the_ledger_says(uri, comparison, read(comparison)[1])
    # The study's fields; 300 points of 6 metrics, 4 parameters, 2 tags, the final numbers; its end.
    total = 300 * 6 + 4 + 2 + len(finals(comparison, *ends(comparison).values()))
    assert sizes[1:-1] == [800, 800, total - 1600]


def test_a_dead_server_is_one_line_and_found_out_at_once(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError) as refusal:
        Mlflow("http://user:secret@127.0.0.1:9")
    (line,) = str(refusal.value).splitlines()
    assert line.startswith("http://127.0.0.1:9: MLflow cannot be used there: ")
    assert "secret" not in line


def test_an_address_of_no_kind_is_one_line():
    with pytest.raises(InputError, match=r"^ftp://x: MLflow cannot be used there: "):
        Mlflow("ftp://x")


def test_a_store_that_fails_later_is_one_line(uri, compared, monkeypatch):
    log = Mlflow(uri)

    def gone(*_, **__):
        raise OSError("the server\nis gone")

    monkeypatch.setattr(MlflowClient, "create_run", gone)
    with pytest.raises(NormlabError, match=r"MLflow cannot be used there: the server is gone$"):
        log.write(compared(name="gone", seeds=1))


def test_mlflows_own_setting_is_used_where_none_is_given(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Mlflow().out == uri


def test_the_environment_is_left_as_it_was_found(uri, compared, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    before = dict(os.environ)
    Mlflow(uri).write(compared(name="left", seeds=1))
    assert dict(os.environ) == before
