import os
import stat
import sys

import pytest

from normlab.files import cache_folder, replace


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    replace(path, "new ±")
    assert path.read_bytes() == "new ±".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_can_be_read_by_those_who_can_read_others(tmp_path):
    mask = os.umask(0o022)
    try:
        replace(tmp_path / "a.txt", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have folders of their own")
def test_the_cache_is_the_platforms_folder_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NORMLAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "normlab"
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert list(tmp_path.iterdir()) == []
