import shutil
import time
from itertools import pairwise

import pandas as pd
import pytest

from normlab.report import CHARTS, headline, write, write_runs
from normlab.report.charts import colors
from normlab.report.sensitivity import range_sentences
from normlab.study import Comparison

pytestmark = pytest.mark.slow
ENTER = "\ue007"  # The key, as WebDriver has it.
SHOWN = [name for name in CHARTS if name != "sensitivity"]  # These studies have one rate.


@pytest.fixture
def opened(browser):
    """Opens a report in a window, with or without JavaScript, and waits for its charts."""

    def open_page(path, width=1100, height=900, *, javascript=True, state=""):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not javascript})
        browser.get_log("browser")
        browser.get("about:blank")
        browser.get(path.as_uri() + state)
        if javascript:
            redraw(browser)
        return browser

    return open_page


def redraw(browser):
    """Draws once more, after all that is being drawn."""
    browser.set_script_timeout(60)
    script = "const done = arguments[0]; normlab.draw().then(() => done(null), e => done(`${e}`))"
    assert browser.execute_async_script(script) is None


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
    if javascript:  # Charts are drawn for the width, and not made small.
        script = """return [...document.querySelectorAll("svg.marks")].map(
            one => one.getBoundingClientRect().width / one.viewBox.baseVal.width)"""
        assert min(browser.execute_script(script)) > 0.9


def test_in_a_browser_a_study_with_nothing_done_has_no_error(nothing, opened):
    browser = opened(nothing[1] / "report.html")
    assert errors(browser) == []


def test_in_a_browser_charts_that_are_drawn_again_stay_as_they_are(compared, opened, tmp_path):
    comparison = compared(seeds=2, lr=[0.01, 0.1], probes=["units", "smoothness"])
    browser = opened(write(comparison, tmp_path))
    shown = "figure:not([hidden]) .chart svg.marks"
    before = sizes(browser, shown)
    redraw(browser)
    assert sizes(browser, shown) == before
    # The panels of two layers stand beside each other where there is room.
    panels = sizes(browser, "#chart-dead-units .mark-group.role-scope.cell > g > path.background")
    assert {height for _, height in before} != {0}
    assert all(width > height for width, height in panels)
    press(browser, "seeds")  # Those at the rate that is reported, of two.
    assert len(lines(browser)) == 3 * 2 * (1 + 2)


def test_in_a_wide_window_the_verdicts_of_arms_with_long_names_are_seen(compared, opened, tmp_path):
    arms = ["plain", "batch@post+dropout:0.25", "dropout:0.5+batch@post"]
    browser = opened(write(compared(arms=arms), tmp_path))
    for label in ("Verdicts", "Tests"):
        script = """const box = document.querySelector(arguments[0]);
            return [box.scrollWidth, box.clientWidth]"""
        scrolled, client = browser.execute_script(script, f"[aria-label={label}]")
        assert scrolled <= client


def test_in_a_narrow_window_runs_with_long_names_do_not_scroll_sideways(make_run, opened, tmp_path):
    runs = []
    for letter in "ab":
        shutil.copytree(make_run(seeds=2, epochs=1), tmp_path / (letter * 60))
        runs.append(Comparison(tmp_path / (letter * 60)))
    browser = opened(write_runs(runs, tmp_path), width=320)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    # What each was measured with is beside its heading, and not beyond the window.
    box = browser.find_element("css selector", ".details td").rect
    assert box["x"] + box["width"] <= 320


def test_in_a_narrow_window_the_words_of_a_chart_are_broken_once(compared, opened, tmp_path):
    comparison = compared(seeds=2, lr=[0.01, 0.1])
    browser = opened(write(comparison, tmp_path), width=390)
    lines = "#chart-sensitivity .role-title-subtitle text > tspan"
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent.trim())"
    )
    said = browser.execute_script(script, lines)
    assert " ".join(said).endswith(" ".join(range_sentences(comparison)))
    longest = max(map(len, said))
    told = said[next(i for i, line in enumerate(said) if line.startswith("plain is")) :]
    for line, following in pairwise(told):
        assert line.endswith(".") or len(f"{line} {following.split()[0]}") > longest


def lines(browser, name="accuracy"):
    """The colours of the lines of a chart."""
    script = """return [...document.querySelectorAll(arguments[0])].map(
        one => one.getAttribute("stroke"))"""
    return browser.execute_script(script, f"#chart-{name} .mark-line.role-mark path")


def press(browser, name, value=None):
    """Presses a control as the keyboard does, and waits for what it changes."""
    selector = f"#controls [name={name}]" + (f"[value='{value}']" if value else "")
    control = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].focus()", control)
    control.send_keys(" ")
    redraw(browser)


def axis(browser, name="accuracy"):
    script = """return [...new Set([...document.querySelectorAll(arguments[0])].map(
        one => one.textContent))]"""
    return browser.execute_script(script, f"#chart-{name} .role-axis-title text")


def labels(browser, name="accuracy"):
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
    return browser.execute_script(script, f"#chart-{name} .role-axis-label text")


def test_in_a_browser_the_controls_choose_what_is_drawn(reported, opened):
    comparison, folder = reported
    palette = colors(comparison)
    browser = opened(folder / "report.html")
    assert sorted(lines(browser)) == sorted(3 * [*palette.values()])
    press(browser, "arm", "plain")
    press(browser, "split", "validation")
    shown = [color for arm, color in palette.items() if arm != "plain"]
    assert sorted(lines(browser)) == sorted(2 * shown)
    press(browser, "seeds")
    assert len(lines(browser)) == 2 * 3 * (1 + 6)
    script = """return [...document.querySelectorAll("#chart-accuracy .mark-line.role-mark path")]
        .map(one => one.getAttribute("stroke-width"))"""
    drawn = browser.execute_script(script)
    means = 3 * ["2"]
    assert drawn == 2 * (3 * 6 * ["1"] + means)  # The means are above the seeds, in both panels.
    press(browser, "metric", "loss")
    assert sizes(browser, "#chart-loss") == [[0, 0]]
    press(browser, "x", "steps")
    assert sorted(axis(browser)) == ["accuracy", "step"]
    assert "400" in labels(browser)
    press(browser, "x", "seconds")
    assert sorted(axis(browser))[1].startswith("seconds (")
    assert len(lines(browser)) == 2 * 3 * (1 + 6)
    assert errors(browser) == []


def test_in_a_browser_the_address_keeps_what_was_chosen(reported, opened):
    _, folder = reported
    browser = opened(folder / "report.html")
    before = browser.current_url
    press(browser, "arm", "plain")
    press(browser, "log-x")
    address = browser.current_url
    assert address != before
    drawn = lines(browser), axis(browser), ticks(browser)
    opened(folder / "report.html", state="#" + address.partition("#")[2])
    assert (lines(browser), axis(browser), ticks(browser)) == drawn
    browser.find_element("css selector", "#controls button[type=reset]").click()
    wait_for(lambda: browser.current_url, before)
    redraw(browser)
    assert len(lines(browser)) == 3 * 4
    assert ticks(browser) != drawn[2]


def ticks(browser, name="accuracy"):
    """Where the ticks of the axes are."""
    script = """return [...document.querySelectorAll(arguments[0])].map(
        one => one.getAttribute("transform"))"""
    return browser.execute_script(script, f"#chart-{name} .role-axis-tick line")


def test_in_a_browser_the_loss_alone_can_be_on_a_log_scale(compared, opened, tmp_path):
    # Two seeds that differ: bands reach below zero, where a logarithm has nothing.
    browser = opened(write(compared(seeds=2, noise=0.02), tmp_path))
    loss, accuracy = ticks(browser, "loss"), ticks(browser)
    press(browser, "log-y")
    assert ticks(browser, "loss") != loss
    assert ticks(browser) == accuracy
    shapes = (
        "return [...document.querySelectorAll('#chart-loss path')].map(x => x.outerHTML).join()"
    )
    assert "NaN" not in browser.execute_script(shapes)
    assert all(float(label.replace("−", "-")) > 0 for label in labels(browser, "loss") if label)
    assert errors(browser) == []


def test_in_a_browser_the_page_follows_an_address_that_is_changed(reported, opened):
    browser = opened(reported[1] / "report.html")
    browser.execute_script("location.hash = 'arm=batch&split=test&metric=accuracy&x=steps'")
    wait_for(lambda: lines(browser), [colors(reported[0])["batch"]])
    wait_for(lambda: sorted(axis(browser)), ["accuracy", "step"])


def test_in_a_browser_charts_fit_a_window_that_is_made_narrow(reported, opened):
    browser = opened(reported[1] / "report.html")
    panels = "#chart-accuracy .role-scope.cell > g > path.background"
    script = """return new Set([...document.querySelectorAll(arguments[0])].map(
        one => one.getBoundingClientRect().top)).size"""
    assert browser.execute_script(script, panels) == 1
    metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wait_for(lambda: browser.execute_script(script, panels), 3)  # Below each other.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_in_a_browser_a_chart_can_be_saved_by_keyboard(reported, opened, tmp_path):
    browser = opened(reported[1] / "report.html")
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    button = browser.find_element("css selector", "#chart-loss summary")
    assert button.accessible_name == "Save this chart"
    button.send_keys(ENTER)
    choices = browser.find_elements("css selector", "#chart-loss .vega-actions a")
    wait_for(lambda: [one.text for one in choices], ["Save as SVG", "Save as PNG"])
    for one, kind, start in zip(choices, ("svg", "png"), (b"<svg", b"\x89PNG"), strict=True):
        one.send_keys(ENTER)
        path = tmp_path / f"made-up-loss.{kind}"
        wait_for(path.exists, True)
        assert path.read_bytes().startswith(start)
    assert errors(browser) == []


def test_in_a_browser_the_page_says_what_it_has_no_room_for(
    compared, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr("normlab.report.page.room", lambda *_: 0)
    browser = opened(write(compared(seeds=2, epochs=1), tmp_path))
    told = browser.find_element("css selector", ".downloads span").text
    assert told == "Without the measurements of 4 replicas, for which this page has no room."


def test_in_a_browser_the_data_of_several_runs_can_be_saved(make_run, opened, tmp_path):
    names = ["a, b", 'so "called"']
    for name in names:
        shutil.copytree(make_run(seeds=2, epochs=1), tmp_path / name)
    runs = [Comparison(tmp_path / name) for name in names]
    browser = opened(write_runs(runs, tmp_path))
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    for what, count in (("measurements", 2 * 2 * 6), ("replicas", 2 * 2)):
        browser.find_element("css selector", f"[data-csv={what}]").click()
        wait_for((tmp_path / f"runs-{what}.csv").exists, True)
        saved = pd.read_csv(tmp_path / f"runs-{what}.csv")
        assert saved.columns[0] == "run"
        expected = {f"made-up ({name})": count for name in names}
        assert saved["run"].value_counts().to_dict() == expected


def test_in_a_browser_a_page_takes_a_new_state_and_keeps_its_controls(nothing, reported, opened):
    state = "#arm=batch&split=test&metric=accuracy&x=steps"
    browser = opened(nothing[1] / "report.html", state=state)
    new = (reported[1] / "report.html").read_text("utf-8")
    script = """const page = new DOMParser().parseFromString(arguments[0], "text/html");
        for (const id of ["report", "data"]) {
          document.getElementById(id).replaceChildren(...page.getElementById(id).childNodes);
        }"""
    browser.execute_script(script, new)
    redraw(browser)
    assert lines(browser) == [colors(reported[0])["batch"]]
    assert sorted(axis(browser)) == ["accuracy", "step"]
    press(browser, "arm", "layer")
    assert len(lines(browser)) == 2
    assert errors(browser) == []


def test_in_a_browser_the_data_can_be_saved(reported, opened, tmp_path):
    comparison, folder = reported
    browser = opened(folder / "report.html")
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    for what, frame in (
        ("measurements", comparison.frame()),
        ("replicas", comparison.replicas()),
    ):
        browser.find_element("css selector", f"[data-csv={what}]").click()
        path = tmp_path / f"made-up-{what}.csv"
        wait_for(path.exists, True)
        saved = pd.read_csv(path)
        assert list(saved.columns) == list(frame.columns)
        order = [key for key in ("arm", "seed", "step", "split", "metric") if key in frame]
        for key in ("arm", "seed", "step", "status", "value", "seconds", "final_test_loss"):
            if key in frame:
                ours, theirs = (one.sort_values(order)[key] for one in (saved, frame))
                assert list(ours) == list(theirs)
        if what == "measurements":
            ours, theirs = (
                pd.to_datetime(one.sort_values(order)["time"]) for one in (saved, frame)
            )
            apart = ours.to_numpy() - theirs.to_numpy()
            assert abs(apart).max() <= pd.Timedelta(milliseconds=1)


@pytest.mark.parametrize("javascript", [True, False])
def test_in_a_browser_a_dark_page_has_light_text_and_dark_grounds(reported, opened, javascript):
    browser = opened(reported[1] / "report.html", javascript=javascript)
    script = """const style = (selector, what) =>
        getComputedStyle(document.querySelector(selector))[what];
        return [style("body", "backgroundColor"), style("#chart-accuracy svg", "backgroundColor"),
                style("#chart-accuracy .role-axis-label text", "fill"),
                style("#chart-accuracy .mark-line path[stroke='#0072b2']", "stroke")]"""
    button = "return getComputedStyle(document.querySelector('.chart summary')).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        seen[scheme] = browser.execute_script(script)
        if javascript and scheme == "dark":
            assert browser.execute_script(button) == "rgb(31, 41, 55)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    clear = "rgba(0, 0, 0, 0)"
    assert seen == {
        "light": ["rgb(255, 255, 255)", clear, "rgb(31, 41, 55)", "rgb(0, 114, 178)"],
        "dark": ["rgb(17, 24, 39)", clear, "rgb(229, 231, 235)", "rgb(75, 163, 227)"],
    }


def test_in_a_browser_every_drawing_has_its_description(reported, opened):
    browser = opened(reported[1] / "report.html")
    for name in SHOWN:
        box = browser.find_element("css selector", f"#chart-{name}")
        # The box does not scroll, and does not stand in the way of the keyboard.
        assert [box.get_attribute(each) for each in ("tabindex", "role")] == [None, None]
        (drawing,) = box.find_elements("css selector", "svg.marks")
        assert drawing.get_attribute("role") == "img"
        (hidden,) = drawing.find_elements("css selector", "svg > g")
        assert hidden.get_attribute("aria-hidden") == "true"
        assert drawing.get_attribute("aria-label").startswith(CHARTS[name])


def test_in_a_browser_runs_are_set_side_by_side_or_in_one_panel(compared, opened, tmp_path):
    runs = [compared(seeds=2), compared(seeds=2, arms=["plain", "layer"], epochs=2)]
    browser = opened(write_runs(runs, tmp_path))
    gray, blue, orange = colors(compared(arms=["plain", "batch", "layer"])).values()
    assert sorted(lines(browser)) == sorted([gray, gray, blue, orange])
    panels = """return [...document.querySelectorAll(
        "#chart-accuracy .mark-group.role-scope.cell > g")].length"""
    dashes = """return [...document.querySelectorAll("#chart-accuracy .mark-line.role-mark path")]
        .map(one => one.getAttribute("stroke-dasharray"))"""
    assert browser.execute_script(panels) == 2
    assert set(browser.execute_script(dashes)) == {None}
    press(browser, "together")
    assert browser.execute_script(panels) == 1
    assert sorted(browser.execute_script(dashes)) == ["1,0", "1,0", "4,2", "4,2"]
    assert errors(browser) == []
