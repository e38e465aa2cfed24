import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import normlab
from normlab.cli import main

MINE = """
import torch
from torch import nn

def model(momentum=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 10)
    )
    for _ in range(60):
        model(torch.rand(64, 1, 28, 28))
    return model

def batches():
    return [torch.rand(64, 1, 28, 28) for _ in range(4)]

def healthy():
    return model(), batches()

def worse():
    found = model()
    found[2].running_mean += found[2].running_var.sqrt() / 2
    return found, batches()

def ill():
    return model(0.99), batches()

def other():
    return 3

def raises():
    raise KeyError("mine")
"""


def call(*arguments):
    try:
        main(["doctor", *arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def refused(capsys, *arguments):
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("normlab: ")
    return line.removeprefix("normlab: ")


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doctors_patient.py").write_text(MINE)


def test_a_healthy_model_is_0_and_an_error_is_1(capsys):
    assert call("doctors_patient:healthy") == 0
    assert "error" not in capsys.readouterr().out
    assert call("doctors_patient:worse") == 0
    assert "\nwarning: stale statistics in 2\n" in capsys.readouterr().out
    assert call("doctors_patient:ill") == 1
    out = capsys.readouterr().out
    assert out.startswith("1 error, 1 information; 1 batch norm layers, 256 samples in 4 batches\n")
    assert "  fix: model.get_submodule('2').momentum = 0.01\n" in out


def test_json_is_one_document_and_the_page_is_written(capsys, tmp_path):
    assert call("doctors_patient:ill", "--json", "--report", "page.html") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["findings"][0]["layer"] == "2"
    assert err == "Report: page.html\n"
    assert "momentum convention" in (tmp_path / "page.html").read_text("utf-8")


def test_the_report_is_named_after_the_findings(capsys, monkeypatch):
    monkeypatch.setattr(normlab.Diagnosis, "report", lambda _, path: path)
    assert call("doctors_patient:healthy", "--report", "page.html") == 0
    assert capsys.readouterr().out.endswith("\nReport: page.html\n")


def test_data_is_a_set_or_a_function_of_batches(capsys):
    options = ("--samples", "300", "--batch-size", "128", "--json")
    call("doctors_patient:model", "--data", "mnist", *options)
    told = json.loads(capsys.readouterr().out)
    assert (told["batches"], told["samples"]) == (3, 300)
    # The model never saw images like these.
    assert "stale statistics" in {each["signal"] for each in told["findings"]}
    assert "train/eval gap" not in told["not_measured"]
    assert call("doctors_patient:model", "--data", "doctors_patient:batches", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 256


def test_a_checkpoint_is_loaded_first(capsys):
    scope = {}
    exec(MINE, scope)
    state = scope["model"]().state_dict()
    state["2.running_var"] = state["2.running_var"] * 100
    save_file(state, "good.safetensors")
    assert call("doctors_patient:healthy", "--checkpoint", "good.safetensors") == 1
    assert "error: stale statistics in 2\n" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_match_is_refused_by_its_keys(capsys):
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.LayerNorm(8), nn.Linear(8, 10))
    save_file(other.state_dict(), "other.safetensors")
    line = refused(capsys, "doctors_patient:healthy", "--checkpoint", "other.safetensors")
    assert line == (
        "other.safetensors does not match the model: 3 missing (2.num_batches_tracked, "
        "2.running_mean, 2.running_var); 2 of another shape (1.bias (9 for 8), 1.weight (9×784 for "
        "8×784))"
    )
    save_file({**other.state_dict(), **{f"x{i}": torch.ones(1) for i in range(9)}}, "o.safetensors")
    line = refused(capsys, "doctors_patient:healthy", "--checkpoint", "o.safetensors")
    assert "9 unexpected (x0, x1, x2, …)" in line
    Path("bad.safetensors").write_text("no")
    line = refused(capsys, "doctors_patient:healthy", "--checkpoint", "bad.safetensors")
    assert line.startswith("bad.safetensors: not a safetensors file")
    line = refused(capsys, "doctors_patient:healthy", "--checkpoint", "none.safetensors")
    assert line == "none.safetensors: there is no such file"


def test_wrong_input_is_one_line(capsys):
    assert "a model alone: name its data with --data" in refused(capsys, "doctors_patient:model")
    assert refused(capsys, "doctors_patient:other").startswith(
        "doctors_patient:other returned int: expected a torch.nn.Module"
    )
    assert refused(capsys, "doctors_patient:raises").endswith("raised KeyError: 'mine'")
    assert refused(capsys, "lenet").startswith("lenet: expected module:function")
    line = refused(capsys, "doctors_patient:model", "--data", "mnist", "--samples", "0")
    assert line == "--samples 0: expected a number above 0"
    line = refused(capsys, "doctors_patient:model", "--data", "mnist", "--scaling", "2")
    assert line == "--scaling 2: expected 0..1 or -1..1"
    assert "did you mean mnist?" in refused(capsys, "doctors_patient:model", "--data", "mnits")
    assert refused(capsys, "--modle").endswith("see normlab doctor --help")
    assert "has no batch norm layers" in refused(capsys, "torch.nn:Identity", "--data", "mnist")
