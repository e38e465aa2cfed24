"""Fetching over HTTP from a server on this machine, and what is kept."""

import gzip
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.progress

from normlab.data import download
from normlab.data.cache import fetch_published, place, read_published
from normlab.data.layouts import AbsentError, DamagedError
from normlab.data.progress import Progress
from normlab.errors import FetchError, InputError

pytestmark = pytest.mark.usefixtures("cache")

QUIET = Progress(False)
LARGE = "train-images-idx3-ubyte.gz"

PROGRAM = """
import json, sys
from normlab.data.cache import fetch_published
from normlab.data.layouts import IDX
from normlab.data.progress import Progress
from normlab.data.published import Array, Published
from normlab.data.sources import Mirror
url, arrays = sys.argv[1], json.loads(sys.argv[2])
arrays = {key: Array(tuple(shape), sha256) for key, (shape, sha256) in arrays.items()}
fetch_published(Published("small", arrays, (), (Mirror(url, IDX),)), None, Progress(True))
"""


def fetching(published):
    """Start a process that fetches a set from its mirror."""
    command = [sys.executable, "-c", PROGRAM, str(published.sources[0])]
    arrays = json.dumps(published.arrays)
    return subprocess.Popen([*command, arrays], stderr=subprocess.PIPE, text=True)


def assert_kept(published, cache):
    """The cache holds the set, and nothing else but the lock."""
    kept = read_published(published)
    assert kept["train_images"].shape == (300, 28, 28)
    names = sorted(path.name for path in cache.iterdir())
    assert [name for name in names if name != "small.lock"] == ["small.safetensors"]


def assert_not_kept(published):
    with pytest.raises(AbsentError, match="is not in"):
        read_published(published)


@pytest.mark.parametrize("how", ["ordinary", "moved", "slow", "truncated"])
def test_a_set_is_fetched_and_kept(how, server, small, cache, capsys, monkeypatch):
    # A slow server is not a silent one: each piece comes in time.
    monkeypatch.setattr(download, "_SILENT_SECONDS", 1.0)
    published = small(f"{server.url}/{how}/")
    path = fetch_published(published, None, Progress(True))
    assert path == place(published) == cache / "small.safetensors"
    assert_kept(published, cache)
    assert f"small: trying {server.url}/{how}/" in capsys.readouterr().err
    asked = len(server.asked)
    fetch_published(published, None, QUIET)
    assert len(server.asked) == asked


def test_what_is_missing_after_a_break_is_asked_for(server, small):
    fetch_published(small(f"{server.url}/truncated/"), None, QUIET)
    starts = [start for _, name, start in server.asked if name == LARGE]
    half = len(server.files[LARGE]) // 2
    assert starts[:2] == [None, f"bytes={half // 8192 * 8192}-"]


@pytest.mark.parametrize("how", ["ordinary", "truncated"])
def test_on_a_terminal_there_is_a_bar(how, server, small, cache, monkeypatch):
    shown = []
    update = rich.progress.Progress.update

    def record(*arguments, **facts):
        shown.append(facts)
        update(*arguments, **facts)

    monkeypatch.setattr(rich.progress.Progress, "update", record)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch_published(small(f"{server.url}/{how}/"), None, Progress(True))
    assert_kept(small(), cache)
    totals = {facts["total"] for facts in shown if "total" in facts}
    assert totals == {len(content) for content in server.files.values()}


def test_a_server_without_ranges_that_breaks_off_is_given_up(server, small):
    with pytest.raises(FetchError, match=r"rangeless/: .*IncompleteRead"):
        fetch_published(small(f"{server.url}/rangeless/"), None, QUIET)
    assert len(server.asked) == 2
    assert_not_kept(small())


def test_a_server_that_falls_silent_is_given_up(server, small, monkeypatch):
    monkeypatch.setattr(download, "_SILENT_SECONDS", 0.2)
    with pytest.raises(FetchError, match=r"silent/: .*timed out"):
        fetch_published(small(f"{server.url}/silent/"), None, QUIET)


def test_a_corrupt_file_is_not_kept_and_not_gone_on_with(server, small, cache):
    with pytest.raises(FetchError, match=r"corrupt/: the files in .* cannot be read \(.*CRC"):
        fetch_published(small(f"{server.url}/corrupt/"), None, QUIET)
    assert_not_kept(small())
    fetch_published(small(f"{server.url}/ordinary/"), None, QUIET)
    assert {start for how, _, start in server.asked if how == "ordinary"} == {None}
    assert_kept(small(), cache)


def test_another_set_under_the_same_name_is_refused(server, small):
    server.files = dict(server.files)
    name = "train-labels-idx1-ubyte.gz"
    server.files[name] = server.files[LARGE]
    with pytest.raises(FetchError, match=r"train_labels have the shape \(300, 28, 28\), not"):
        fetch_published(small(f"{server.url}/ordinary/"), None, QUIET)
    assert_not_kept(small())


def test_the_next_source_is_tried_and_a_failure_names_all(server, small, cache):
    absent, gone = f"{server.url}/absent/", "http://127.0.0.1:9/"
    try:
        raise KeyError("what the caller was handling is no reason")
    except KeyError:
        with pytest.raises(FetchError) as raised:
            fetch_published(small(absent, gone), None, QUIET)
    lines = str(raised.value).splitlines()
    assert lines[0] == "small cannot be had:"
    assert lines[1] == f"the cache: small.safetensors is not in {cache}"
    assert lines[2] == f"{absent}: the server answers 404"
    assert lines[3] == f"{gone}: Connection refused"
    assert lines[4].startswith("To put it there by hand: get small.safetensors")
    assert "train-images-idx3-ubyte.gz" in lines[4]
    assert lines[4].endswith("normlab data fetch small --data-dir FOLDER")
    assert [path.name for path in cache.iterdir()] in ([], ["small.lock"])
    fetch_published(small(absent, gone, f"{server.url}/ordinary/"), None, QUIET)
    assert_kept(small(), cache)


def test_a_name_that_cannot_be_found_fails_at_once(small):
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"nowhere.invalid/: .*(not known|resolution|resolve)"):
        fetch_published(small("http://nowhere.invalid/"), None, QUIET)
    assert time.monotonic() - started < 10


def lay_aside(server, cache, content):
    """Put a partial file where an earlier fetch would have left it."""
    folder = cache / "small.partial" / f"127.0.0.1-{server.server_port}"
    folder.mkdir(parents=True)
    (folder / f"{LARGE}.part").write_bytes(content)


def test_a_part_that_is_whole_is_only_given_its_name(server, small, cache):
    lay_aside(server, cache, server.files[LARGE])
    fetch_published(small(f"{server.url}/ordinary/"), None, QUIET)
    assert_kept(small(), cache)
    starts = [start for _, name, start in server.asked if name == LARGE]
    assert starts == [f"bytes={len(server.files[LARGE])}-"]


@pytest.mark.parametrize("part", ["longer", "other"])
def test_a_part_of_another_file_is_thrown_away(part, server, small, cache):
    content = server.files[LARGE]
    lay_aside(server, cache, content + b"more" if part == "longer" else bytes(1000))
    fetch_published(small(f"{server.url}/ordinary/"), None, QUIET)
    assert_kept(small(), cache)
    assert [start for _, name, start in server.asked if name == LARGE][-1] is None


def test_a_server_that_sends_another_range_is_not_believed(server, small, cache):
    lay_aside(server, cache, server.files[LARGE][:1000])
    with pytest.raises(FetchError, match="shifted/: the server answers 206 bytes 0-"):
        fetch_published(small(f"{server.url}/shifted/"), None, QUIET)


def test_a_fetch_that_is_killed_is_gone_on_with(server, small, cache, until):
    server.pause = 0.1
    published = small(f"{server.url}/slow/")
    part = cache / "small.partial" / f"127.0.0.1-{server.server_port}" / f"{LARGE}.part"
    with fetching(published) as process:
        try:
            until(lambda: part.exists() and part.stat().st_size > 50_000)
        finally:
            process.send_signal(signal.SIGKILL)
    have = part.stat().st_size
    assert have < len(server.files[LARGE])
    assert_not_kept(published)
    server.pause = 0
    fetch_published(published, None, QUIET)
    assert_kept(published, cache)
    starts = [start for _, name, start in server.asked if name == LARGE]
    assert starts == [None, f"bytes={have}-"]


def test_two_fetches_at_once_are_one(server, small, cache, until, capsys):
    server.pause = 0.05
    published = small(f"{server.url}/slow/")
    with fetching(published) as process:
        until(lambda: server.asked)
        fetch_published(published, None, Progress(True))
        assert "trying" in process.communicate(timeout=60)[1]
    assert process.returncode == 0
    waited = capsys.readouterr().err
    assert waited == "small: waiting for another process that fetches it\n"
    assert_kept(published, cache)
    assert len(server.asked) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_entry_is_fetched_again(damage, server, small):
    published = small(f"{server.url}/ordinary/")
    path = fetch_published(published, None, QUIET)
    whole = path.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"cut": whole[:-10], "changed": changed, "empty": b""}[damage])
    with pytest.raises(DamagedError):
        read_published(published)
    fetch_published(published, None, QUIET)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("held", ["packed", "unpacked", "archive", "cached", "cached below"])
def test_the_users_folder_comes_first(held, server, small, cache, tmp_path, monkeypatch):
    published = small(f"{server.url}/ordinary/")
    mine = tmp_path / "mine"
    (mine / "small").mkdir(parents=True)
    if held == "packed":
        for name, content in server.files.items():
            (mine / name).write_bytes(content)
    elif held == "unpacked":
        for name, content in server.files.items():
            (mine / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    else:
        kept = fetch_published(published, None, QUIET)
        if held == "archive":
            np.savez(mine / "small.npz", **read_published(published))
            kept.unlink()
        else:
            kept.rename((mine if held == "cached" else mine / "small") / kept.name)
    server.asked.clear()
    monkeypatch.setenv("NORMLAB_DATA", str(mine))
    fetch_published(published, None, QUIET)
    assert_kept(published, cache)
    assert server.asked == []


def test_a_folder_with_other_files_says_so_and_the_next_source_is_tried(small, tmp_path):
    np.savez(tmp_path / "small.npz", train_images=np.zeros(3))
    with pytest.raises(FetchError, match=rf"the folder {tmp_path}: .*train_labels"):
        fetch_published(small(), tmp_path, QUIET)
    (tmp_path / "small.npz").unlink()
    with pytest.raises(FetchError, match=rf"the folder {tmp_path}: it has no such files"):
        fetch_published(small(), tmp_path, QUIET)


def test_folders_that_cannot_be_used_are_refused(small, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="absent is no folder: --data-dir and NORMLAB_DATA"):
        fetch_published(small(), tmp_path / "absent", QUIET)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written .*: name another folder in NORMLAB_C"):
        fetch_published(small(), None, QUIET)


def test_a_full_disk_is_a_reason_and_leaves_no_entry(server, small, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FetchError, match=r"ordinary/: .*No space left on device"):
        fetch_published(small(f"{server.url}/ordinary/"), None, QUIET)
    assert_not_kept(small())
    monkeypatch.undo()
