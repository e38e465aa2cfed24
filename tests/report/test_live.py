import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from normlab.report import Live
from normlab.study import Study
from normlab.training import Measurement, Outcome, Replica

STUDY = Study(arms=["plain", "batch"], seeds=2, epochs=2)
PLAIN, BATCH = Replica("plain", 0.01, 0), Replica("batch", 0.01, 0)


@pytest.fixture
def clock(monkeypatch):
    """What the display takes for the time, to be set by the test."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("normlab.report.live.time", fake)
    return now


@pytest.fixture
def written(clock):
    """Shows events, each at its time, and returns what is written where there is no terminal."""

    def write(events, done=0, study=STUDY, width=80):
        console = Console(file=io.StringIO(), width=width)
        with Live(study, console) as live:
            live.begin(done, len(study.replicas))
            for seconds, event in events:
                clock.seconds = seconds
                live(event)
        return console.file.getvalue()

    return write


@pytest.fixture
def shown(clock):
    """Shows events on a terminal, and returns all that it was sent."""

    def show(events, done=0, study=STUDY, width=100):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=True, legacy_windows=False)
        with Live(study, console) as live:
            live.begin(done, len(study.replicas))
            for seconds, event in events:
                clock.seconds = seconds
                live(event)
        return console.file.getvalue()

    return show


def measured(replica, epoch, loss=0.2, accuracy=0.95, split="validation"):
    values = {("test", "loss"): 0.3, ("test", "accuracy"): 0.9}
    values |= {(split, "loss"): loss, (split, "accuracy"): accuracy}
    return Measurement(replica, 100 * epoch, epoch, values)


def trained(replica, begin=0.0, end=3.0, status="done"):
    return [
        ((begin + end) / 2, measured(replica, 1, loss=0.25, accuracy=0.92)),
        (end, measured(replica, 2)),
        (end, Outcome(replica, status, 1200, end - begin)),
    ]


def screen(text):
    """The lines that a terminal shows after it was sent a text."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row -= int(token[2:-1])
            elif token == "\x1b[2K":
                lines[row] = ""
            else:
                assert token[-1] in "mhl"
        else:
            lines[row] = (
                lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            )
            column += len(token)
    return [line.rstrip() for line in lines]


def frames(text):
    """The text without its colours, one line each."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


def interrupted(live):
    with live:
        live.begin(0, 4)
        raise KeyboardInterrupt


def test_a_line_is_written_for_each_replica_that_ends(written):
    batch = Replica("batch", 0.01, 1)
    events = trained(PLAIN) + trained(BATCH, 3, 7) + trained(Replica("plain", 0.01, 1), 7, 9)
    assert written(events + trained(batch, 9, 84)).splitlines() == [
        "[1/4] plain, lr 0.01, seed 0: validation loss 0.2000, accuracy 95.00%, 3 s, "
        "about 9 s left",
        "[2/4] batch, lr 0.01, seed 0: validation loss 0.2000, accuracy 95.00%, 4 s, "
        "about 7 s left",
        "[3/4] plain, lr 0.01, seed 1: validation loss 0.2000, accuracy 95.00%, 2 s, "
        "about 3 s left",
        "[4/4] batch, lr 0.01, seed 1: validation loss 0.2000, accuracy 95.00%, 1 min 15 s",
    ]


def test_a_measurement_alone_writes_nothing(written):
    assert written([(1, measured(PLAIN, 1))]) == ""


def test_the_last_measurement_of_the_replica_itself_is_told(written):
    events = [
        (1, measured(PLAIN, 2, loss=0.1, accuracy=0.97)),
        (2, measured(BATCH, 2, loss=0.4, accuracy=0.91)),
        (2, Outcome(PLAIN, "done", 200, 2.0)),
    ]
    assert "seed 0: validation loss 0.1000, accuracy 97.00%, 2 s" in written(events)


def test_without_validation_data_the_test_split_is_told(written):
    study = Study(arms=["plain"], seeds=1, epochs=1, validation=0)
    events = [(1, measured(PLAIN, 1, split="test")), (1, Outcome(PLAIN, "done", 100, 1.0))]
    expected = "[1/1] plain, lr 0.01, seed 0: test loss 0.2000, accuracy 95.00%, 1 s\n"
    assert written(events, study=study) == expected


def test_a_run_that_goes_on_says_so_and_counts_what_is_there(written):
    assert written(trained(Replica("plain", 0.01, 1)), done=2).splitlines() == [
        "2 of 4 replicas are in the ledger; going on",
        "[3/4] plain, lr 0.01, seed 1: validation loss 0.2000, accuracy 95.00%, 3 s, "
        "about 3 s left",
    ]


@pytest.mark.parametrize("done", [0, 4])
def test_a_run_that_does_not_go_on_does_not_say_so(written, done):
    assert written([], done=done) == ""


@pytest.mark.parametrize("measurements", [0, 1])
def test_a_replica_that_diverged_is_shown_and_has_no_epochs_left(written, measurements):
    ended = Outcome(BATCH, "diverged", 1200, 2.0)
    events = [*[(1, measured(BATCH, 1))] * measurements, (2, ended)]
    expected = "[1/4] batch, lr 0.01, seed 0: diverged by step 1,200, 2 s, about 6 s left\n"
    assert written(events) == expected


def test_time_left_counts_the_epochs_of_all_workers(written):
    events = [
        (4, measured(BATCH, 1)),
        (4, measured(PLAIN, 2)),
        (6, Outcome(PLAIN, "done", 200, 6.0)),
    ]
    assert written(events).endswith(", 6 s, about 10 s left\n")


def test_a_line_is_neither_folded_nor_coloured(written):
    study = Study(arms=["group:8"], seeds=1, epochs=2)
    text = written(trained(Replica("group:8", 0.01, 0)), study=study, width=30)
    assert text == "[1/1] group:8, lr 0.01, seed 0: validation loss 0.2000, accuracy 95.00%, 3 s\n"


def test_a_terminal_shows_what_is_done_and_what_is_in_training(shown):
    diverged = (6, Outcome(BATCH, "diverged", 1200, 3.0))
    lines = frames(shown([*trained(PLAIN), diverged, (7, measured(PLAIN._replace(seed=1), 1))]))
    whole = [line for line in lines if line.startswith("all replicas")][-1]
    assert "2/4 done, 1 diverged, about 4 s left" in whole
    training = [line for line in lines if line.startswith("plain, lr 0.01, seed 1")]
    assert training
    assert "epoch 1/2  validation loss 0.2000, accuracy 95.00%" in training[-1]
    assert max(map(len, lines)) <= 100
    ended = lines[lines.index(whole) :]
    assert not any(line.startswith("plain, lr 0.01, seed 0") for line in ended)


def test_a_terminal_of_80_columns_shows_whole_numbers(shown):
    study = Study(arms=["plain", "batch"], seeds=2, epochs=10)
    lines = frames(shown([(4, measured(BATCH, 1))], study=study, width=80))
    training = [line for line in lines if line.startswith("batch, lr 0.01, seed 0")][-1]
    assert "validation loss 0.2000, accuracy 95.00%" in training
    assert "…" not in training


def test_nothing_is_left_on_a_terminal(shown):
    text = shown([*trained(PLAIN), (4, measured(BATCH, 1))])
    assert "all replicas" in text
    assert set(screen(text)) == {""}
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # The cursor is back.


def test_only_the_line_of_a_run_that_goes_on_is_left_on_a_terminal(shown):
    lines = screen(shown(trained(PLAIN._replace(seed=1)), done=2))
    assert [line for line in lines if line] == ["2 of 4 replicas are in the ledger; going on"]


def test_a_terminal_is_told_that_nothing_is_left_to_run(shown):
    text = shown([], done=4)
    assert any("4/4 done" in line for line in frames(text))
    assert "left" not in text
    assert set(screen(text)) == {""}


def test_an_error_in_the_run_passes_through_and_gives_the_terminal_back():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt):
        interrupted(Live(STUDY, console))
    assert set(screen(console.file.getvalue())) == {""}


def test_without_a_console_it_writes_to_standard_error(capsys):
    with Live(STUDY) as live:
        live.begin(1, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "1 of 4 replicas are in the ledger; going on\n"
