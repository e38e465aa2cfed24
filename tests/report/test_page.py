import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser

import pytest

from normlab.errors import NormlabError
from normlab.report import CHARTS, headline, write
from normlab.report.charts import colors
from normlab.study import Comparison

FOUR_ARMS = {"arms": ["plain", "batch", "layer", "group:8"]}
HOSTILE = (
    '<script>alert(1)</script></pre></p><img src="x:" onerror="window.harmed = 1"> & "so" $title'
)
KINDS = ("svg", "png")
SHOWN = [name for name in CHARTS if name != "sensitivity"]  # These studies have one rate.
FILES = sorted(
    ["report.html", "summary.json", *(f"{name}.{kind}" for name in SHOWN for kind in KINDS)]
)
VOID = ("meta", "link", "img", "br", "input", "hr")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
            return
        for tag, attributes in self.open:
            for name in {tag, attributes.get("class")} - {None}:
                self.texts[name] = self.texts.get(name, "") + data


@pytest.fixture(scope="module")
def reported(compared, tmp_path_factory):
    """A comparison of four arms, and the folder of its report."""
    comparison = compared(description=HOSTILE, **FOUR_ARMS)
    folder = tmp_path_factory.mktemp("report")
    assert write(comparison, folder) == folder / "report.html"
    return comparison, folder


@pytest.fixture(scope="module")
def small(compared, tmp_path_factory):
    """A comparison that takes little time, and the folder of its report."""
    comparison = compared(seeds=2, epochs=1)
    folder = tmp_path_factory.mktemp("small")
    write(comparison, folder)
    return comparison, folder


@pytest.fixture(scope="module")
def nothing(compared, tmp_path_factory):
    """A comparison of which nothing is measured yet, and the folder of its report."""
    comparison = compared(missing=lambda _: True, workers=1)
    folder = tmp_path_factory.mktemp("nothing")
    write(comparison, folder)
    return comparison, folder


@pytest.fixture(scope="module")
def alone(compared, tmp_path_factory):
    """A comparison of one run, and the folder of its report."""
    comparison = compared(arms=["plain"], seeds=1, epochs=1)
    folder = tmp_path_factory.mktemp("alone") / "new" / "folder"
    write(comparison, folder)
    return comparison, folder


@pytest.fixture(scope="module")
def page(reported):
    return (reported[1] / "report.html").read_text("utf-8")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_is_a_page_a_summary_and_each_chart_twice(reported):
    files = contents(reported[1])
    assert sorted(files) == FILES
    for name in SHOWN:
        assert files[f"{name}.svg"].startswith(b"<svg")
        assert files[f"{name}.svg"].rstrip().endswith(b"</svg>")
        assert files[f"{name}.png"].startswith(b"\x89PNG\r\n\x1a\n")
        assert files[f"{name}.png"].endswith(b"IEND\xaeB`\x82")
        assert len(files[f"{name}.png"]) > 10_000


def test_one_arm_has_no_chart_of_differences(alone):
    expected = [name for name in FILES if not name.startswith("difference")]
    assert sorted(contents(alone[1])) == expected


def test_one_arm_has_no_evidence(alone):
    assert "evidence" not in (alone[1] / "report.html").read_text("utf-8")


def test_the_summary_is_the_comparison_s(reported):
    comparison, folder = reported
    text = (folder / "summary.json").read_text("utf-8")
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary == comparison.summary()
    assert {"study", "run", "seconds", "arms", "verdicts"} <= set(summary)
    assert summary["run"] == str(comparison.folder)
    assert summary["seconds"] == 60.0
    assert summary["study"]["description"] == HOSTILE
    assert len(summary["verdicts"]) == 3 * 4
    keys = {
        *("metric", "arm", "baseline", "difference", "interval", "confidence", "p", "p_holm"),
        *("effect_size", "share_improved", "correlation", "equivalence_margin", "verdict"),
        "seeds_needed",
    }
    for verdict in summary["verdicts"]:
        assert keys <= set(verdict)
    first = summary["verdicts"][0]
    assert [first[key] for key in ("metric", "arm", "baseline", "verdict")] == [
        *("final_test_accuracy", "batch", "plain", "better")
    ]
    assert first["difference"] == pytest.approx(0.0203, abs=5e-5)


@pytest.mark.parametrize("kind", ["nothing", "alone"])
def test_a_study_with_little_to_show_has_a_report_too(request, kind):
    comparison, folder = request.getfixturevalue(kind)
    files = contents(folder)
    assert json.loads(files["summary.json"], parse_constant=pytest.fail) == comparison.summary()
    parsed = Page(files["report.html"].decode())
    assert parsed.texts["answer"] == "".join(headline(comparison))
    specs = json.loads(parsed.scripts[1], parse_constant=pytest.fail)
    assert {f"{name}.png" for name in specs} == {name for name in files if name.endswith("png")}


def test_the_page_is_well_formed_and_answers_first(reported, page):
    comparison, _ = reported
    texts = Page(page).texts
    assert texts["title"] == "made-up · normlab"
    assert texts["h1"] == "made-up"
    assert texts["answer"] == "".join(headline(comparison))
    assert page.index('class="answer"') < page.index("<table>") < page.index("<figure>")
    assert texts["pre"] == comparison.study.to_toml()
    details = texts["details"]
    assert "Seeds0, 1, 2, 3, 4, 5Replicas24Time spent measuring1 min 0 s" in details
    session = comparison.sessions[0]
    assert f"Measured from {session['started']}" in details
    for name, version in json.loads(session["versions"]).items():
        assert f"{name} {version}; " in details
    assert details.endswith("2 worker processes")


def test_the_page_tells_the_chosen_rates(compared):
    comparison = compared(lr=[0.001, 0.01], seeds=2, epochs=1)
    details = Page(write(comparison, comparison.folder).read_text("utf-8")).texts["details"]
    assert "Chosen, each by the other seedsplain lr 0.01; batch lr 0.01" in details


def test_nothing_done_by_one_worker_is_told_as_it_is(nothing):
    details = Page((nothing[1] / "report.html").read_text("utf-8")).texts["details"]
    assert "epoch of 0 steps" not in details
    assert details.endswith("; 1 worker process")


def test_no_text_of_the_study_becomes_markup(page):
    parsed = Page(page)
    assert parsed.texts["description"] == HOSTILE
    assert len(parsed.scripts) == 3
    assert not any("alert(1)" in script for script in parsed.scripts)
    assert "img" not in {tag for tag, _ in parsed.elements}


def test_the_page_fetches_nothing(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base")
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", parsed.texts["style"])
    specs = json.loads(parsed.scripts[1])
    assert list(specs) == list(SHOWN)
    assert '"url"' not in parsed.scripts[1]


def test_the_page_is_small_enough_to_send(page):
    assert len(page.encode()) < 2_000_000


def test_the_page_shows_each_chart_as_a_drawing_too(reported, page):
    _, folder = reported
    for name in SHOWN:
        svg = (folder / f"{name}.svg").read_text("utf-8")
        assert f'<figure><div id="chart-{name}">{svg}</div></figure>' in page


def test_the_same_run_gives_the_same_report(small, tmp_path):
    comparison, folder = small
    write(Comparison(comparison.folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_another_process_gives_the_same_report_from_the_ledger_alone(small, tmp_path):
    comparison, folder = small
    (tmp_path / "run").mkdir()
    shutil.copy(comparison.folder / "ledger.sqlite", tmp_path / "run")
    program = (
        "import sys, pathlib, normlab.data, normlab.training.engine as engine\n"
        "engine.load = engine._train = normlab.data.load = None\n"
        "from normlab.report import write\n"
        "from normlab.study import Comparison\n"
        "write(Comparison(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", program, "run", "out"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(arguments, cwd=tmp_path, env=environment, check=True, timeout=60)
    expected, again = contents(folder), contents(tmp_path / "out")
    moved = json.loads(again.pop("summary.json"))
    assert moved == {**json.loads(expected.pop("summary.json")), "run": "run"}
    assert again == expected


def test_nothing_is_trained_for_a_report(small, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a report does not train")

    monkeypatch.setattr("torch.nn.Module.__call__", refuse)
    monkeypatch.setattr("torch.Tensor.backward", refuse)
    monkeypatch.setattr("normlab.training.fleet.Fleet.train", refuse)
    monkeypatch.setattr("normlab.training.engine.load", refuse)
    comparison, _ = small
    before = (comparison.folder / "ledger.sqlite").read_bytes()
    write(Comparison(comparison.folder), tmp_path)
    assert sorted(contents(tmp_path)) == FILES
    assert (comparison.folder / "ledger.sqlite").read_bytes() == before


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_leaves_every_file_whole(small, tmp_path, monkeypatch, written):
    comparison, folder = small
    new, old = contents(folder), {name: b"old " + name.encode() for name in FILES}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    calls, sync = [], os.fsync

    def fill(descriptor):
        calls.append(descriptor)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(NormlabError) as error:
        write(comparison, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: the report cannot be written: No space left on device; the measurements are "
        f"kept: mend that, and run normlab report {comparison.folder}"
    )
    after = contents(tmp_path)
    assert sorted(after) == FILES
    replaced = [name for name in FILES if after[name] != old[name]]
    assert len(replaced) == written
    assert all(after[name] == new[name] for name in replaced)
    assert after["report.html"] == old["report.html"]


def test_a_reader_of_the_old_report_keeps_it_whole(small, tmp_path):
    comparison, folder = small
    (tmp_path / "report.html").write_text("old")
    with (tmp_path / "report.html").open() as reader:
        write(comparison, tmp_path)
        assert reader.read() == "old"
    assert contents(tmp_path) == contents(folder)


def test_a_file_in_the_way_is_told_and_kept(small, tmp_path):
    comparison, _ = small
    (tmp_path / "report").write_text("mine")
    with pytest.raises(NormlabError, match="the report cannot be written: File exists"):
        write(comparison, tmp_path / "report")
    assert (tmp_path / "report").read_text() == "mine"


FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        yield driver
        driver.quit()


@pytest.fixture
def opened(browser):
    """Opens a report in a window, with or without JavaScript, and waits for its charts."""

    def open_page(path, width=1100, height=900, javascript=True):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not javascript})
        browser.get_log("browser")
        browser.get(path.as_uri())
        deadline = time.monotonic() + 20
        while javascript and len(sizes(browser, ".vega-embed .marks")) < len(SHOWN):
            assert time.monotonic() < deadline, browser.get_log("browser")
            time.sleep(0.05)
        return browser

    return open_page


def sizes(browser, selector):
    script = """return [...document.querySelectorAll(arguments[0])].map(
        one => [one.getBoundingClientRect().width, one.getBoundingClientRect().height])"""
    return browser.execute_script(script, selector)


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_in_a_browser_every_chart_is_drawn_without_an_error_or_a_request(reported, opened):
    browser = opened(reported[1] / "report.html")
    for name in SHOWN:
        ((width, height),) = sizes(browser, f"#chart-{name}.vega-embed .marks")
        assert width > 500
        assert height > 100
    entries = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    requested = browser.execute_script(entries)
    assert [url for url in requested if not url.startswith(("data:", "blob:", "file:"))] == []
    assert errors(browser) == []
    assert browser.execute_script("return window.harmed") is None


def test_in_a_browser_the_answer_is_seen_first(reported, opened):
    comparison, folder = reported
    browser = opened(folder / "report.html")
    answer = browser.find_element("css selector", ".answer")
    assert answer.is_displayed()
    assert answer.text.splitlines() == headline(comparison)
    assert answer.rect["y"] + answer.rect["height"] < 450
    table = browser.find_element("css selector", "table")
    assert answer.rect["y"] + answer.rect["height"] < table.rect["y"]


def test_in_a_browser_without_javascript_the_drawings_are_seen(reported, opened):
    browser = opened(reported[1] / "report.html", javascript=False)
    assert sizes(browser, ".vega-embed") == []
    for name in SHOWN:
        ((width, height),) = sizes(browser, f"#chart-{name} > svg")
        assert width > 500
        assert height > 100
        drawing = browser.find_element("css selector", f"#chart-{name} > svg")
        assert drawing.is_displayed()
        assert CHARTS[name] in drawing.text


def mouse(browser, element, *, click):
    script = """arguments[0].scrollIntoView({block: "center"});
        const box = arguments[0].getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]"""
    x, y = browser.execute_script(script, element)
    event = {"x": x, "y": y, "button": "left", "clickCount": 1}
    for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **event})


def opacities(browser, name, color):
    script = """return [...document.querySelectorAll(arguments[0])].map(
        one => Number(one.getAttribute("stroke-opacity") ?? one.getAttribute("opacity") ?? 1))"""
    return browser.execute_script(script, f"#chart-{name} .mark-line path[stroke='{color}']")


def wait_for(seen, expected):
    deadline = time.monotonic() + 5
    while seen() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert seen() == expected


def test_in_a_browser_a_click_on_the_legend_picks_an_arm(reported, opened):
    comparison, folder = reported
    palette = colors(comparison)
    browser = opened(folder / "report.html")
    for name in ("accuracy", "loss"):
        labels = browser.find_elements("css selector", f"#chart-{name} .role-legend-label text")
        assert [label.text for label in labels] == list(palette)
        mouse(browser, labels[1], click=True)
        for arm, color in palette.items():
            expected = [1 if arm == "batch" else 0.15] * 3
            wait_for(lambda c=color, n=name: opacities(browser, n, c), expected)
    assert errors(browser) == []


def test_in_a_browser_a_point_tells_its_numbers(reported, opened):
    browser = opened(reported[1] / "report.html")
    point = browser.find_element("css selector", "#chart-accuracy .mark-symbol.role-mark path")
    mouse(browser, point, click=False)
    wait_for(lambda: len(sizes(browser, "#vg-tooltip-element.visible")), 1)
    tooltip = browser.find_element("css selector", "#vg-tooltip-element").text
    for expected in ("arm", "mean", "low", "high", "seeds", "diverged", "%"):
        assert expected in tooltip
    assert errors(browser) == []


@pytest.mark.parametrize(("width", "javascript"), [(390, True), (390, False), (320, True)])
def test_in_a_narrow_window_the_page_does_not_scroll_sideways(reported, opened, width, javascript):
    browser = opened(reported[1] / "report.html", width=width, javascript=javascript)
    script = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    scrolled, client = browser.execute_script(script)
    assert client == width
    assert scrolled <= client


def test_in_a_browser_a_study_with_nothing_done_has_no_error(nothing, opened):
    browser = opened(nothing[1] / "report.html")
    assert errors(browser) == []
