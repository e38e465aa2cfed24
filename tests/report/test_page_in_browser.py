import shutil
import tempfile
import time

import pytest

from normlab.report import CHARTS, headline
from normlab.report.charts import colors

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
        while javascript and len(sizes(browser, ".vega-embed .marks")) < len(CHARTS):
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
    for name in CHARTS:
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
    for name in CHARTS:
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
