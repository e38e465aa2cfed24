"""`normlab data`, and `normlab compare` on data that is not bundled."""

import json

import numpy as np
import pytest
from PIL import Image

from normlab.cli import main
from normlab.data import datasets
from normlab.data.published import PUBLISHED
from normlab.errors import NormlabError
from normlab.study import Study, run

RUN = ["--network", "mlp:4", "--validation", "30", "--epochs", "1", "--workers", "1"]
RUN += ["--batch-size", "16", "--arms", "plain", "--engine", "looped"]


def call(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def refused(capsys, *arguments, code=2):
    capsys.readouterr()
    assert call(*arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("normlab: ")
    return line


@pytest.fixture
def known(server, small, cache, monkeypatch):
    """The small set as one of those that are known by name, on a server."""
    monkeypatch.setitem(PUBLISHED, "small", small(f"{server.url}/ordinary/"))
    datasets._load_published.cache_clear()
    yield cache / "small.safetensors"
    datasets._load_published.cache_clear()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The user's own data, `mine.npz` in the current folder; returns what changes it."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(3).integers(0, 256, (180, 6, 6), np.uint8)

    def save():
        np.savez("mine.npz", images=images, labels=np.arange(180) % 3)
        images[17, 3, 3] ^= 1

    save()
    return save


def test_a_set_is_listed_fetched_found_and_verified(known, capsys):
    assert "small is not here" in refused(capsys, "data", "where", "small", code=1)
    assert call("data", "verify", "small") == 1
    assert capsys.readouterr().out == "small is not here: normlab data fetch small gets it\n"
    assert call("data", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["mnist", "1×28×28", "60,000", "+", "10,000", "10"]
    assert lines[-1].endswith("3 classes  not here: normlab data fetch small")
    assert call("data", "fetch", "small", "mnist") == 0
    fetched = capsys.readouterr()
    assert fetched.out.splitlines() == [str(known), str(PUBLISHED["mnist"].bundled)]
    assert "small: trying http://127.0.0.1" in fetched.err
    assert call("data", "where", "small") == 0
    assert capsys.readouterr().out == f"{known}\n"
    assert call("data", "list", "--json") == 0
    facts = json.loads(capsys.readouterr().out)[-1]
    assert facts["path"] == str(known)
    assert (facts["image_shape"], facts["train"], facts["test"]) == ([1, 28, 28], 300, 60)
    assert call("data", "verify") == 0
    assert "small: all arrays are as they were published" in capsys.readouterr().out


def test_verify_finds_a_changed_byte_and_fails(known, capsys):
    call("data", "fetch", "small")
    whole = known.read_bytes()
    known.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert call("data", "verify", "mnist", "small", "--json") == 1
    out, err = capsys.readouterr()
    faults = json.loads(out)
    assert faults["mnist"] is None
    assert "(their SHA-256 differs); normlab data fetch small puts it right" in faults["small"]
    assert err == "normlab: not here, or not as published: small\n"
    assert call("data", "fetch", "small") == 0
    assert call("data", "verify", "small") == 0


def test_a_fetch_that_fails_has_a_line_for_each_source(known, server, capsys):
    server.files = {}
    assert call("data", "fetch", "small") == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err[err.index("normlab: ") :].splitlines()
    assert lines[0] == "normlab: small cannot be had:"
    assert lines[1] == f"  the cache: small.safetensors is not in {known.parent}"
    assert lines[2].endswith("/ordinary/: the server answers 404")
    assert lines[3].startswith("  To put it there by hand: ")


@pytest.mark.usefixtures("known")
def test_a_study_fetches_its_data_before_its_display_begins(monkeypatch, capsys):
    def begin(_):
        raise NormlabError("begun")

    monkeypatch.setattr("normlab.report.Live", begin)
    assert call("compare", "--dataset", "small", *RUN) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["trying", "kept", "begun"]


@pytest.mark.usefixtures("mine")
def test_own_data_is_described_with_a_sheet(capsys, tmp_path):
    assert call("data", "show", "mine.npz", "--out", "sheet.png", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["train"], described["test"]) == ([50] * 3, [10] * 3)
    assert described["test_is_drawn"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert call("data", "show", "mine.npz") == 0
    assert "150 training and 30 test images (one of six of each class, drawn here)" in (
        capsys.readouterr().out
    )
    assert "absent/x.png cannot be written" in refused(
        capsys, "data", "show", "mine.npz", "--out", "absent/x.png"
    )


def test_a_study_of_own_data_goes_on_unless_the_data_changed(mine, tmp_path, capsys):
    fields = {"network": "mlp:4", "validation": 30, "epochs": 1, "batch_size": 16, "seeds": 1}
    study = Study(dataset="mine.npz", arms="plain", **fields)
    for _ in range(2):
        run(study, tmp_path / "run", engine="looped")
    mine()
    arguments = ["compare", "--dataset", "mine.npz", *RUN, "--seeds", "1", "--out", "run"]
    line = refused(capsys, *arguments)
    assert "run was begun with another dataset: the SHA-256 of mine.npz was " in line
    assert line.endswith("name another folder with --out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "Expected one of {list, fetch, where, verify, show}"),
        (["data", "shw"], "shw; see normlab data --help"),
        (["data", "fetch"], "name a set: mnist, fashion-mnist, cifar10"),
        (["data", "fetch", "mnits"], "unknown published set 'mnits' (did you mean mnist?)"),
        (["data", "where", "mine.npz"], "unknown published set 'mine.npz'"),
        (["data", "verify", "mnits"], "unknown published set 'mnits'"),
        (["data", "show", "mnits"], "unknown dataset 'mnits' (did you mean mnist?)"),
        (["data", "show", "absent.npz"], "absent.npz: there is no such file or folder"),
        (["data", "show", "mnist", "--out", "x.jpg"], "expected a file whose name ends in .png"),
        (["compare", "--dataset", "absent:make"], "absent cannot be imported"),
        (["compare", "--dataset", "./absent"], "./absent: there is no such file or folder"),
    ],
)
def test_what_cannot_be_used_gets_one_line(
    arguments, message, capsys, cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not cache.exists()
    assert list(tmp_path.iterdir()) == []
