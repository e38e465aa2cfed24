"""What a page that is watched does by itself, in a browser, with a page that keeps to the contract:

what changes is in `#report` and `#data`, and `normlab.draw()` draws it again.
"""

import time

import pytest

from normlab.report import Watch
from normlab.study import Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome

STUDY = Study(name="watched", arms=["plain"], seeds=1, epochs=2)
(PLAIN,) = STUDY.replicas
VALUES = {("test", metric): 0.5 for metric in ("accuracy", "loss")}
PAGE = """<!doctype html>
<html lang="en"><head><title>{rows} rows</title></head><body>
<main id="report">
<p>{rows} rows</p>
<ul>{items}</ul>
<div style="height: 3000px"></div>
<ul><li><button>one</button></li><li><button>two</button> <input id="three"></li></ul>
<script>window.harmed = true;</script>
</main>
<script type="application/json" id="data">{rows}</script>
<script>
window.drawn = [];
window.normlab = {{draw: () => drawn.push(document.getElementById("data").textContent)}};
</script>
</body></html>"""
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def broken(monkeypatch):
    """Draws a page of the contract; what the test puts into the list goes wrong."""
    wrong = []

    def page_html(comparison):
        if wrong:
            raise wrong[0]
        rows = len(comparison.frame())
        return PAGE.format(rows=rows, items="<li>a row</li>" * rows)

    monkeypatch.setattr("normlab.report.watching.page_html", page_html)
    monkeypatch.setattr("normlab.report.watching._FIRST", 0.0)
    return wrong


def ask(browser, script):
    return browser.execute_script(f"return {script}")


def wait(browser, script, expected):
    deadline = time.monotonic() + 20
    while (seen := ask(browser, script)) != expected:
        assert time.monotonic() < deadline, (seen, browser.get_log("browser"))
        time.sleep(0.05)


def status(browser, expected):
    wait(browser, "document.querySelector('[role=status]').textContent", expected)


@pytest.fixture
def served(tmp_path, capsys, browser):
    """A run that is watched, with its page in the browser."""
    with Watch(tmp_path) as page, Ledger.write(tmp_path, STUDY) as ledger:
        ledger.begin_session(workers=1)
        page.begin(0, 1)
        browser.get(capsys.readouterr().err.split()[1])
        yield ledger


def test_a_page_grows_where_it_is_and_as_it_is(browser, served):
    status(browser, "live")
    ask(browser, "[window.here = true, harmed = false, scrollTo(0, 1500)]")
    ask(browser, "[...document.querySelectorAll('button')].at(-1).focus({preventScroll: true})")
    served.add(Measurement(PLAIN, 10, 1, VALUES), 1.0)
    wait(browser, "document.querySelector('#report p').textContent", "2 rows")
    wait(browser, "drawn", ["2"])
    wait(browser, "document.activeElement.textContent", "two")
    assert ask(browser, "scrollY") == 1500
    assert ask(browser, "[here, harmed]") == [True, False]  # Nothing was loaded or run again.
    wait(browser, "document.getElementById('report').style.minHeight", "")
    ask(browser, "document.getElementById('three').focus({preventScroll: true})")
    served.add(Measurement(PLAIN, 20, 2, VALUES), 2.0)
    wait(browser, "drawn", ["2", "4"])
    wait(browser, "document.activeElement.id", "three")
    assert browser.get_log("browser") == []


def test_a_page_survives_that_it_is_loaded_again(browser, served):
    served.add(Measurement(PLAIN, 10, 1, VALUES), 1.0)
    browser.refresh()
    assert ask(browser, "document.querySelector('#report p').textContent") == "2 rows"
    status(browser, "live")


def test_a_page_that_cannot_be_drawn_says_so_until_it_can(browser, served, broken):
    status(browser, "live")
    broken.append(ValueError("no ink"))
    served.add(Measurement(PLAIN, 10, 1, VALUES), 1.0)
    status(browser, "no ink, trying again")
    broken.clear()
    wait(browser, "document.querySelector('#report p').textContent", "2 rows")
    status(browser, "live")


def test_a_page_says_that_the_run_is_over(browser, tmp_path, capsys):
    with Watch(tmp_path) as page:
        with Ledger.write(tmp_path, STUDY) as ledger:
            ledger.begin_session(workers=1)
            page.begin(0, 1)
            browser.get(capsys.readouterr().err.split()[1])
            status(browser, "live")
        status(
            browser,
            "nothing is being written at the moment: the run was interrupted, and goes on with the "
            "same command",
        )
        with Ledger.write(tmp_path, STUDY) as ledger:
            ledger.begin_session(workers=1)
            status(browser, "live")
            ledger.add(Measurement(PLAIN, 20, 2, VALUES), 1.0)
            ledger.add(Outcome(PLAIN, "done", 20, 2.0), 1.0)
    status(browser, f"finished: the report is {tmp_path / 'report.html'}")
    assert ask(browser, "document.querySelector('#report p').textContent") == "2 rows"
    time.sleep(2.5)  # It asks no more of a server that is gone.
    status(browser, f"finished: the report is {tmp_path / 'report.html'}")


def test_a_page_whose_server_is_gone_says_so(browser, tmp_path, capsys):

    def interrupted():
        with Watch(tmp_path) as page, Ledger.write(tmp_path, STUDY):
            page.begin(0, 1)
            browser.get(capsys.readouterr().err.split()[1])
            status(browser, "live")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    status(browser, "connection lost, trying again")
