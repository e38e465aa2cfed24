import re
import shutil
import sqlite3
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from normlab.errors import InputError, LedgerError, NormlabError
from normlab.report import Watch, watch
from normlab.study import Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome

STUDY = Study(name="watched", arms=["plain", "batch"], seeds=1, epochs=2)
PLAIN, BATCH = STUDY.replicas
SPLITS = ("train", "validation", "test")
VALUES = {(split, metric): 0.5 for split in SPLITS for metric in ("accuracy", "loss")}


@pytest.fixture
def clock(monkeypatch):
    """The time, which the test sets; who sleeps wakes at once."""
    now = SimpleNamespace(seconds=1000.0, cpu=0.0)
    fake = SimpleNamespace(
        monotonic=lambda: now.seconds,
        process_time=lambda: now.cpu,
        sleep=lambda _: time.sleep(0.005),
    )
    monkeypatch.setattr("normlab.report.watching.time", fake)
    return now


@pytest.fixture
def drawings(monkeypatch, clock):
    """Draws a page with the number of measurements alone; takes `wall` and `cpu` seconds for it."""
    drawn = SimpleNamespace(count=0, wall=0.0, cpu=0.0, error=None)

    def page_html(comparison):
        drawn.count += 1
        clock.seconds += drawn.wall
        clock.cpu += drawn.cpu
        if drawn.error:
            raise drawn.error
        return f"<html><body>{len(comparison.frame())} rows</body> </html>"

    monkeypatch.setattr("normlab.report.watching.page_html", page_html)
    return drawn


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


class Watching:
    """Watches a folder in a thread of its own."""

    def __init__(self, folder):
        self.lines, self.error = [], None
        self._thread = threading.Thread(target=self._watch, args=(folder,), daemon=True)
        self._thread.start()

    def _watch(self, folder):
        try:
            watch(folder, say=self.lines.append)
        except NormlabError as error:
            self.error = error

    def wait(self, seen):
        deadline = time.monotonic() + 10
        while not seen():
            assert time.monotonic() < deadline, (self.lines, self.error)
            time.sleep(0.01)

    @property
    def address(self):
        self.wait(lambda: self.error or any("http" in line for line in self.lines))
        return next(line.removeprefix("Watch: ") for line in self.lines if "http" in line)

    def get(self, path=""):
        with urlopen(self.address + path, timeout=60) as answer:
            return answer.read().decode()

    @property
    def version(self):
        return self.get("version").split(" ")

    def ended(self):
        self._thread.join(10)
        return not self._thread.is_alive()


@pytest.fixture
def watching(folder):
    """Watches the folder; whatever is still watched in the end is taken away."""
    begun = []

    def begin():
        begun.append(Watching(folder))
        return begun[-1]

    yield begin
    shutil.rmtree(folder)
    assert all(one.ended() for one in begun)


@contextmanager
def writer(folder):
    """Yields what keeps an event, as a run does."""
    with Ledger.write(folder, STUDY) as ledger:
        ledger.begin_session(workers=1)
        yield lambda event: ledger.add(event, seconds=1.0)


def measured(replica, epoch):
    return Measurement(replica, 10 * epoch, epoch, VALUES)


def ended(replica):
    return Outcome(replica, "done", 20, 2.0)


def finish(add):
    for replica in (PLAIN, BATCH):
        add(measured(replica, 2))
        add(ended(replica))


def test_the_page_grows_with_the_ledger(folder, watching, drawings, clock):
    with writer(folder) as add:
        one = watching()
        state, first = one.version
        assert state == "live"
        assert one.get().startswith("<html><body>0 rows<style>")
        assert f'data-version="{first}"' in one.get()
        add(measured(PLAIN, 1))
        clock.seconds += 60
        state, second = one.version
        assert (state, second != first) == ("live", True)
        page = one.get()
        assert "6 rows" in page
        assert f'data-version="{second}"' in page
        assert page.endswith("</script>\n</body> </html>")
        assert drawings.count == 2


def test_a_page_is_drawn_once_for_all_who_ask(folder, watching, drawings):
    with writer(folder):
        one = watching()
        pages = {one.get() for _ in range(5)}
    assert (len(pages), drawings.count) == (1, 1)


def test_nobody_asks_and_nothing_is_drawn(folder, watching, drawings):
    with writer(folder) as add:
        one = watching()
        assert one.address
        add(measured(PLAIN, 1))
        assert one.version[0] == "live"
    assert drawings.count == 0


@pytest.mark.parametrize(("wall", "cpu"), [(3.0, 4.0), (9.0, 3.0)])
def test_drawing_takes_a_twentieth_of_the_time(folder, watching, drawings, clock, wall, cpu):
    drawings.wall, drawings.cpu = wall, cpu
    with writer(folder) as add:
        one = watching()
        assert "0 rows" in one.get()
        for wait, epoch in ((20, 1), (60, 2)):  # The first is paid once; then 3 s in 60.
            before = one.version[1]
            add(measured(PLAIN, epoch))
            clock.seconds += wait - 0.1
            assert one.version == ["live", before]
            assert f"{6 * (epoch - 1)} rows" in one.get()
            clock.seconds += 0.2
            assert one.version[1] != before
            assert f"{6 * epoch} rows" in one.get()
    assert drawings.count == 3


def test_a_page_that_cannot_be_drawn_says_why_and_is_not_tried_all_the_time(
    folder, watching, drawings, clock
):
    with writer(folder) as add:
        one = watching()
        one.get()
        add(measured(PLAIN, 1))
        clock.seconds += 60
        drawings.wall, drawings.cpu, drawings.error = 1.0, 1.0, ValueError("no ink")
        with pytest.raises(URLError) as error:
            one.get()
        assert (error.value.code, error.value.read()) == (500, b"no ink")
        error.value.close()
        assert "0 rows" in one.get()
        drawings.error = None
        clock.seconds += 21
        assert "6 rows" in one.get()


def test_the_last_page_does_not_wait_and_ends_the_server(folder, watching, drawings, clock):
    with writer(folder) as add:
        one = watching()
        assert "0 rows" in one.get()
        before = one.version[1]
        finish(add)
        assert one.version == ["live", before]  # The first page is new.
    state, last = one.version
    assert (state, last != before) == ("finished", True)
    assert "12 rows" in one.get()
    assert one.version == ["finished", last]
    assert len(one.lines) == 1
    clock.seconds += 2.6  # Any other page that is open has asked by now.
    assert one.ended()
    assert one.lines[1:] == [f"The study is complete. Report: {folder / 'report.html'}"]
    with pytest.raises(URLError):
        one.get()
    assert drawings.count == 2


@pytest.mark.parametrize(("asked", "patience"), [(False, 5), (True, 75)])
def test_the_server_does_not_wait_for_ever(folder, watching, drawings, clock, asked, patience):
    with writer(folder) as add:
        one = watching()
        assert one.address
        if asked:
            one.get()
        finish(add)
    time.sleep(0.2)
    clock.seconds += patience - 0.1
    time.sleep(0.2)
    assert len(one.lines) == 1
    clock.seconds += 0.2
    assert one.ended()
    assert drawings.count == asked


@pytest.mark.usefixtures("drawings")
def test_a_run_that_stopped_is_told_and_may_go_on(folder, watching, clock):
    with writer(folder) as add:
        add(measured(PLAIN, 1))
    one = watching()
    assert one.version[0] == "idle"
    assert "6 rows" in one.get()
    with writer(folder) as add:
        assert one.version[0] == "live"
        finish(add)
    assert one.version[0] == "finished"
    one.get()
    clock.seconds += 2.6
    assert one.ended()


@pytest.mark.usefixtures("drawings")
def test_a_run_that_was_killed_is_told(folder, tmp_path, watching):
    with writer(tmp_path / "alive") as add:
        add(measured(PLAIN, 1))
        # What a kill leaves: the log is beside the file, and nobody has the lock.
        shutil.copytree(tmp_path / "alive", folder, dirs_exist_ok=True)
    assert (folder / "ledger.sqlite-wal").stat().st_size
    one = watching()
    assert one.version[0] == "idle"
    assert "6 rows" in one.get()


@pytest.mark.usefixtures("drawings")
def test_a_run_that_has_not_begun_is_waited_for(folder, watching):
    one = watching()
    one.wait(lambda: one.lines)
    with writer(folder):
        assert one.version[0] == "live"
    assert one.lines[0] == f"{folder} holds no run yet: waiting for one to begin"
    assert len(one.lines) == 2


@pytest.mark.usefixtures("drawings")
def test_a_ledger_that_is_being_made_is_waited_for(folder, watching, monkeypatch):
    (folder / "ledger.sqlite").touch()
    monkeypatch.setattr(Ledger, "in_use", lambda _: True)
    one = watching()
    one.wait(lambda: one.lines)
    assert "waiting" in one.lines[0]
    monkeypatch.undo()
    assert one.ended()  # Nobody makes it.
    assert isinstance(one.error, LedgerError)


def test_what_is_no_ledger_is_refused(folder):
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(LedgerError, match="is not a ledger of normlab"):
        watch(folder)


def test_a_ledger_that_is_taken_away_ends_the_watch(folder, watching):
    with writer(folder):
        pass
    one = watching()
    assert one.address
    (folder / "ledger.sqlite").unlink()
    assert one.ended()
    assert isinstance(one.error, InputError)


def test_a_study_that_is_complete_is_not_watched(folder, capsys):
    with writer(folder) as add:
        finish(add)
    watch(folder)
    said = f"The study is complete. Report: {folder / 'report.html'}\n"
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("drawings")
def test_watching_leaves_the_folder_as_it_is(folder, watching):
    def contents():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    with writer(folder) as add:
        add(measured(PLAIN, 1))
    before = contents()
    one = watching()
    assert one.version[0] == "idle"
    assert "6 rows" in one.get()
    assert contents() == before


def test_the_browser_is_opened_at_the_page(folder, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or interrupt())

    def interrupt():
        raise KeyboardInterrupt

    with writer(folder):
        pass
    lines = []
    watch(folder, browser=True, say=lines.append)  # And Ctrl-C ends it quietly.
    assert lines == [f"Watch: {opened[0]}"]


class Display:
    def __init__(self):
        self.heard = []

    def begin(self, done, total):
        self.heard.append((done, total))

    def __call__(self, event):
        self.heard.append(event)


@pytest.fixture
def address(capsys):
    """The address that was written to standard error, and nothing else with it."""

    def written():
        captured = capsys.readouterr()
        assert captured.out == ""
        return re.fullmatch(r"Watch: (http://127\.0\.0\.1:\d+/[\w-]+/)\n", captured.err).group(1)

    return written


@pytest.mark.usefixtures("drawings")
def test_a_run_is_watched_from_within_until_its_page_has_the_end(folder, address, clock):
    display, states, last = Display(), [], []
    event = measured(PLAIN, 1)

    def follow(url):
        while not last:
            with urlopen(f"{url}version", timeout=10) as answer:
                states.append(answer.read().split()[0])
            if states[-1] == b"finished":
                with urlopen(url, timeout=10) as answer:
                    last.append(answer.read())
                clock.seconds += 2.6

    with Watch(folder, display) as page, writer(folder) as add:
        page.begin(0, 2)
        page(event)
        url = address()
        reader = threading.Thread(target=follow, args=(url,))
        reader.start()
        while not states:
            time.sleep(0.01)
        finish(add)
    reader.join()
    assert display.heard == [(0, 2), event]
    assert set(states) == {b"live", b"finished"}
    assert b"12 rows" in last[0]
    with pytest.raises(URLError):
        urlopen(url, timeout=10)


@pytest.mark.usefixtures("clock")
def test_a_run_that_nobody_watches_waits_for_nobody(folder, address):
    with Watch(folder) as page, writer(folder) as add:
        page.begin(0, 2)
        finish(add)
    assert address()


@pytest.mark.usefixtures("drawings", "clock")
def test_a_run_that_is_interrupted_waits_for_nobody(folder, address):
    def interrupted():
        with Watch(folder) as page, writer(folder):
            page.begin(0, 2)
            urls.append(address())
            with urlopen(urls[0], timeout=10) as answer:
                answer.read()
            raise KeyboardInterrupt

    urls = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (url,) = urls
    with pytest.raises(URLError):
        urlopen(url, timeout=10)


def test_where_nothing_is_left_to_train_nothing_is_served(folder, capsys):
    display = Display()
    with Watch(folder, display) as page:
        page.begin(2, 2)
    assert capsys.readouterr() == ("", "")
    assert display.heard == [(2, 2)]


def test_a_server_that_cannot_begin_is_warned_of_and_the_run_goes_on(folder, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("no port")

    monkeypatch.setattr("normlab.report.watching.Loopback", refuse)
    display = Display()
    with Watch(folder, display) as page:
        page.begin(0, 2)
    assert capsys.readouterr().err == "normlab: warning: nobody can watch: no port\n"
    assert display.heard == [(0, 2)]


@pytest.mark.usefixtures("drawings")
def test_a_page_names_its_report_and_no_text_of_the_folder_becomes_markup(tmp_path):
    folder = tmp_path / '"><b>&amp;'
    with writer(folder) as add:
        add(measured(PLAIN, 1))
    one = Watching(folder)
    page = one.get()
    shutil.rmtree(folder)
    assert one.ended()
    assert 'data-report="' in page
    assert "&quot;&gt;&lt;b&gt;&amp;amp;/report.html" in page
    assert '"><b>' not in page.partition('id="watch"')[2]
