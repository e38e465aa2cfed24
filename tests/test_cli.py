import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
import torch

from normlab import __version__
from normlab import report as reports
from normlab.cli import main
from normlab.errors import InputError
from normlab.study import Comparison, Study
from normlab.study.declaration import FOR_PEOPLE

TINY = ["--network", "mlp:8", "--validation", "59000", "--epochs", "1", "--workers", "1"]


def call(*arguments):
    """Run the command in this process; return its exit code."""
    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def start(*arguments, **options):
    command = [sys.executable, "-m", "normlab", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def refused(capsys, *arguments, code=2):
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("normlab: ")
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, made through the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert call("compare", "--seeds", "2", *TINY, "--out", str(folder)) == 0
    return folder


def test_version_is_the_packages(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"normlab {__version__}\n"


def test_no_arguments_show_the_help(capsys):
    assert call() == 0
    assert "compare" in capsys.readouterr().out


def test_studies_are_listed_a_line_each(capsys):
    assert call("studies") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match("mnist-mlp-adam +A small perceptron on MNIST", line) for line in lines)


def test_every_field_of_a_study_is_an_option(capsys):
    assert call("compare", "--help") == 0
    out = capsys.readouterr().out
    for field in set(Study.model_fields) - set(FOR_PEOPLE):
        assert f"--{field.replace('_', '-')} " in out


def test_a_run_leaves_its_ledger_report_charts_and_summary(run):
    names = {path.name for path in run.iterdir() if not path.name.startswith("ledger")}
    drawn = ("accuracy", "loss", "difference", "gamma", "beta")
    charts = {f"{name}.{kind}" for name in drawn for kind in ("svg", "png")}
    assert names == {"report.html", "summary.json"} | charts
    assert Comparison(run).complete


def test_a_study_can_be_run_as_its_text_had_it(tmp_path, capsys):
    options = ["--validation", "59500", "--epochs", "1", "--workers", "1"]
    out = tmp_path / "run"
    code = call("compare", "mnist-mlp-sgd", "--as-published", *options, "--out", str(out))
    assert code == 0
    study = Comparison(out).study
    assert (study.name, study.arms, study.seeds) == ("mnist-mlp-sgd-as-published", ("batch",), (0,))
    assert study.validation == 59500  # What is said on the command line goes first.
    assert "Nothing that the text printed was measured here" in capsys.readouterr().out
    line = refused(capsys, "compare", "mnist-bfloat16", "--as-published")
    assert line == "normlab: mnist-bfloat16 is of no text: it has no protocol"


def test_inspect_shows_the_layers_of_a_study_and_what_a_run_learned(run, capsys):
    assert call("inspect", "mnist-mlp-adam") == 0
    out = capsys.readouterr().out
    assert "hidden1.norm" in out
    assert "γ" not in out
    assert call("inspect", str(run)) == 0
    assert "γ" in capsys.readouterr().out
    assert call("inspect", str(run), "--json") == 0
    layers = json.loads(capsys.readouterr().out)
    assert [one["layer"] for one in layers if one["kind"] == "BatchNorm1d"] == ["hidden0.norm"]
    assert "unknown study 'nothing'" in refused(capsys, "inspect", "nothing")


def test_json_is_the_only_thing_on_standard_output(run, capsys):
    assert call("compare", "--seeds", "2", *TINY, "--out", str(run), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == str(run)
    assert document["study"]["seeds"] == [0, 1]
    assert document["arms"]["batch"]["final_test_accuracy"]["n"] == 2
    assert document["verdicts"][0]["metric"] == "final_test_accuracy"
    assert document["verdicts"][0]["verdict"] is None


def test_without_json_there_is_a_table_and_the_reports_path(run, capsys):
    assert call("report", str(run)) == 0
    out = capsys.readouterr().out
    assert "batch against plain on final test accuracy" in out
    assert "no verdict from 2 seeds: at least 5 are needed" in " ".join(out.split())
    assert f"Report: {run / 'report.html'}" in out


def test_report_draws_again_from_the_ledger_alone(run, tmp_path, capsys):
    (tmp_path / "ledger.sqlite").write_bytes((run / "ledger.sqlite").read_bytes())
    assert call("report", str(tmp_path), "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["arms"] == Comparison(run).summary()["arms"]
    assert (tmp_path / "accuracy.svg").read_text() == (run / "accuracy.svg").read_text()


def test_report_writes_where_it_is_told_to(run, tmp_path, capsys):
    assert call("report", str(run), "--out", str(tmp_path / "new")) == 0
    assert (tmp_path / "new" / "report.html").exists()
    assert f"Report: {tmp_path / 'new' / 'report.html'}" in capsys.readouterr().out


def test_report_of_several_runs_is_one_page(run, tmp_path, capsys, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert call("report", str(run), str(other)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{run}:"
    assert out.splitlines()[-1] == "Report: runs.html"
    assert (tmp_path / "runs.html").exists()
    assert call("report", str(run), str(other), "--json") == 0
    runs = [summary["run"] for summary in json.loads(capsys.readouterr().out)]
    assert runs == [str(run), str(other)]
    assert "given 2 times" in refused(capsys, "report", str(run), str(run))


@pytest.mark.parametrize("to", ["csv", "parquet", "tensorboard"])
def test_export_writes_to_the_folder_that_is_named_and_says_so(run, tmp_path, capsys, to):
    out = tmp_path / "exported"
    assert call("export", str(run), "--to", to, "--out", str(out)) == 0
    assert capsys.readouterr().out == f"Written: {out}\n"
    assert any(path.is_file() for path in out.rglob("*"))


def test_event_files_are_written_to_the_runs_folder_while_it_trains(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["compare", "--arms", "plain", "--seeds", "1", *TINY, "--out", str(out)]
    assert call(*arguments, "--tensorboard", "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    names = {str(path.parent.relative_to(out)) for path in out.rglob("*tfevents*")}
    assert names == {"tensorboard/plain/lr=0.01/seed=0", "tensorboard/plain/mean"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensorboard"], "tensorboard cannot be imported"),
        (["--mlflow", "sqlite:///here.db"], "mlflow cannot be imported"),
    ],
)
def test_a_log_that_cannot_be_written_is_told_before_anything_is_trained(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for package in ("mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert message in refused(capsys, "compare", *TINY, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_mlflow_cannot_take_is_not_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "MLflow cannot be used there" in refused(capsys, "compare", *TINY, "--mlflow", "ftp://x")
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_named_by_study_and_digest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--arms", "plain", "--seeds", "4", *TINY]
    assert call(*arguments) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mnist-mlp-adam-")
    assert [one.seed for one in Comparison(folder).study.replicas] == [0, 1, 2, 3]
    out = " ".join(capsys.readouterr().out.split())
    assert "4 seeds: a second arm would make a comparison" in out


def test_options_and_a_file_make_the_study(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nnetwork = "mlp:4"\nvalidation = 59000\nepochs = 1\nseeds = [7]\n'
    )
    out = str(tmp_path / "run")
    arguments = ["compare", str(file), "--arms", "layer", "--lr", "0.1", "0.2", "--seeds", "3", "5"]
    arguments += ["--probes", "units", "gradients", "--probe-every", "20"]
    assert call(*arguments, "--drop-last", "false", "--workers", "1", "--out", out) == 0
    study = Comparison(out).study
    assert (study.name, study.network, study.arms) == ("mine", "mlp:4", ("layer",))
    assert (study.lr, study.seeds, study.drop_last) == ((0.1, 0.2), (3, 5), False)
    assert (study.probes, study.probe_every) == (("units", "gradients"), 20)
    assert set(Comparison(out).probes()["step"]) == {0, 20}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist-mlp-adma"], "unknown study 'mnist-mlp-adma' (did you mean mnist-mlp-adam?)"),
        (["absent.toml"], "absent.toml: cannot be read"),
        (["--arms", "plain", "bacth"], "unknown arm 'bacth' (did you mean batch?)"),
        (["--dataset", "imagenet"], "unknown dataset 'imagenet': known are mnist"),
        (["--network", "resnet"], "unknown network 'resnet'"),
        (["--network", "mlp:0"], "whole numbers from 1 to 65536"),
        (["--optimizer", "lion"], "unknown optimizer 'lion': known are adam, sgd"),
        (["--epochs", "0"], "epochs: input should be greater than or equal to 1, got '0'"),
        (["--epochs", "-3"], "epochs: input should be greater than or equal to 1, got '-3'"),
        (["--batch-size", "0"], "batch_size: input should be greater than or equal to 1"),
        (["--batch-size", "70000"], "larger than the training set (55000 images)"),
        (["--batch-size", "1"], "batch of one sample"),
        (["--validation", "1", "--batch-size", "2", "--drop-last", "no"], "batch of one sample"),
        (["--probes", "unit"], "unknown probe 'unit' (did you mean units?)"),
        (["--lr", "0"], "lr: input should be greater than 0, got '0'"),
        (["--lr", "-0.1"], "lr: input should be greater than 0, got '-0.1'"),
        (["--lr", "nan"], "lr: input should be"),
        (["--lr", "fast"], "lr: input should be a valid number"),
        (["--seeds", "0"], "0 seeds: from 1 to 10000 can be asked for"),
        (["--seeds", "ten"], "expected a number of seeds or a list of them, got 'ten'"),
        (["--workers", "0"], "workers=0: at least 1 is needed"),
        (["--workers", "two"], "--workers two: expected a whole number above 0"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used ("),
        (["--validation", "60000"], "0 to 59999 can be held out"),
    ],
)
def test_bad_values_get_one_line_and_leave_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "compare", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("cpu", torch.get_num_threads())),
        (["--device", "cuda"], ("cuda", 1)),
        (["--device", "cuda", "--workers", "3"], ("cuda", 3)),
    ],
)
def test_a_worker_for_each_thread_and_one_for_a_gpu(arguments, expected, monkeypatch):
    asked = {}

    def compare(*_, **options):
        asked.update(options)
        raise InputError("enough is known")

    monkeypatch.setattr("normlab.compare", compare)
    monkeypatch.setattr("normlab.cli.find_device", torch.device)
    assert call("compare", *arguments) == 2
    assert (asked["device"], asked["workers"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\nepochs = = 3\n', "not TOML: "),
        ('name = "x"\nepochs = = 3\n', "line 2"),
        ("epoch = 3\n", "unknown key 'epoch' (did you mean epochs?)"),
        ('lr = "fast"\n', "lr: input should be a valid number"),
        ("lr = inf\n", "lr: input should be a finite number"),
        ('arms = ["plain", "plain"]\n', "arms 'plain' and 'plain' are the same network"),
    ],
)
def test_bad_study_files_name_the_file_and_the_fault(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    line = refused(capsys, "compare", "mine.toml")
    assert message in line
    assert "mine.toml" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--sedes", "3"],
            "Unrecognized options: --sedes, 3; see normlab compare --help",
        ),
        (["compare", "--seeds"], "seeds: "),
        (["report"], "FOLDER"),
        (["export", "runs/mine"], "--to"),
        (["export", "runs/mine", "--to", "csv"], "runs/mine holds no run"),
        (["explain"], "explain"),
    ],
)
def test_what_cannot_be_parsed_gets_one_line_too(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "compare", "--out", str(tmp_path / "file"))
    assert "holds no run" in refused(capsys, "report", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(capsys, "compare", "--out", str(tmp_path / "run"))
    assert "cannot be written" in refused(capsys, "compare", "--out", str(tmp_path))


def test_a_folder_that_no_one_can_write_is_refused(capsys):
    assert "/proc/run cannot be written" in refused(capsys, "compare", "--out", "/proc/run")


def test_a_folder_with_another_study_is_refused(run, capsys):
    before = (run / "ledger.sqlite").read_bytes()
    line = refused(capsys, "compare", "--seeds", "3", *TINY, "--out", str(run))
    assert "holds another study (its seeds is (0, 1), not (0, 1, 2))" in line
    assert (run / "ledger.sqlite").read_bytes() == before


def test_a_damaged_ledger_is_refused(run, tmp_path, capsys):
    whole = (run / "ledger.sqlite").read_bytes()
    (tmp_path / "ledger.sqlite").write_bytes(whole[:5000])
    arguments = ["compare", "--seeds", "2", *TINY, "--out", str(tmp_path)]
    assert "damaged" in refused(capsys, *arguments, code=1)
    assert "damaged" in refused(capsys, "report", str(tmp_path), code=1)
    assert (tmp_path / "ledger.sqlite").read_bytes() == whole[:5000]


def test_a_disk_that_fills_while_training_keeps_what_was_measured(tmp_path):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    arguments = ["compare", "--arms", "plain", "--seeds", "1", *TINY, "--evaluate-every", "1"]
    arguments += ["--epochs", "20", "--network", "mlp:4", "--out", str(tmp_path)]
    process = start(*arguments, preexec_fn=small_files)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert "what was measured before is kept" in err.splitlines()[-1]
    measured = Comparison(tmp_path).frame()
    assert len(measured) > 60
    assert not (tmp_path / "report.html").exists()


def test_a_disk_that_is_full_at_the_report_keeps_the_old_one(run, tmp_path, capsys, monkeypatch):
    for name in ("ledger.sqlite", "report.html"):
        (tmp_path / name).write_bytes((run / name).read_bytes())

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "report", str(tmp_path), code=1)
    assert "No space left on device" in line
    assert f"run normlab report {tmp_path}" in line
    assert (tmp_path / "report.html").read_bytes() == (run / "report.html").read_bytes()


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, workers):
    arguments = ["compare", *TINY[:-2], "--workers", workers, "--seeds", "40"]
    # A suite that was started in the background would hand down that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = start(*arguments, "--out", str(tmp_path / "run"), start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    for line in process.stderr:
        if line.startswith("[3/80]"):
            break
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does it: to all processes at once.
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("normlab: interrupted; what was measured is kept: run the same command")
    assert 3 <= Comparison(tmp_path / "run").frame()["seed"].nunique() * 2 <= 80


def test_a_run_is_watched_while_it_trains(tmp_path, capsys, monkeypatch):
    pages, begin = [], reports.Live.begin

    def look(live, done, total):
        begin(live, done, total)
        address = re.search(r"Watch: (http\S+)", capsys.readouterr().err).group(1)
        with urlopen(address, timeout=60) as answer:
            pages.append(answer.read().decode())

    monkeypatch.setattr(reports.Live, "begin", look)
    monkeypatch.setattr("normlab.report.watching._Live.linger", lambda *_, **__: None)
    out = tmp_path / "run"
    arguments = ["compare", "--arms", "plain", "--seeds", "1", *TINY, "--out", str(out)]
    assert call(*arguments, "--watch", "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert "No measurements yet; 0 of 1 replicas done" in pages[0]
    for part in ('<main id="report"', 'id="data">', "draw"):
        assert part in pages[0]
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("ledger")) == [
        *("ledger.lock", "ledger.sqlite")
    ]


def test_a_run_is_watched_from_outside_until_ctrl_c(run, tmp_path):
    """What is watched is a copy of a finished run, of which a replica is taken away."""
    shutil.copy(run / "ledger.sqlite", tmp_path)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("DELETE FROM replica WHERE arm = 'batch'")
    connection.close()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = start("watch", str(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    line = process.stdout.readline()
    address = re.fullmatch(r"Watch: (http://127\.0\.0\.1:\d+/[\w-]+/)\n", line).group(1)
    with urlopen(f"{address}version", timeout=60) as answer:
        assert answer.read().startswith(b"idle ")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_complete_run_is_not_watched(run, capsys):
    assert call("watch", str(run)) == 0
    said = f"The study is complete. Report: {run / 'report.html'}\n"
    assert capsys.readouterr().out == said


def test_what_cannot_be_watched_is_refused(run, tmp_path, capsys):
    absent = str(tmp_path / "absent")
    assert refused(capsys, "watch", absent).endswith("is not there: expected the folder of a run")
    shutil.copy(run / "ledger.sqlite", tmp_path)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("DELETE FROM replica")
    connection.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, "watch", str(tmp_path), "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be listened at (Address already in use)" in line
    assert "expected a number from 1" in refused(capsys, "watch", str(tmp_path), "--port", "70000")


def test_a_reader_that_goes_away_is_no_error(run):
    with start("report", str(run), "--json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_second_run_in_the_same_folder_waits_for_nobody(tmp_path, capsys):
    arguments = ["compare", *TINY, "--seeds", "20", "--out", str(tmp_path / "run")]
    process = start(*arguments)
    try:
        while not (tmp_path / "run" / "ledger.sqlite").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert "is in use by another run" in refused(capsys, *arguments)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench"], "layers"),
        (["bench", "frogs"], "invalid choice 'frogs'"),
        (["bench", "layers", "--seconds", "0"], "--seconds 0.0: expected a number above 0"),
        (["bench", "layers", "--seconds", "nan"], "--seconds nan: expected a number above 0"),
        (["bench", "layers", "--seconds", "two"], "two"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)
