import errno
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from normlab.errors import NormlabError
from normlab.report import CHARTS, headline, html, page_html, write
from normlab.study import Comparison

HOSTILE = (
    '<script>alert(1)</script></pre></p><img src="x:" onerror="window.harmed = 1"> & "so" $title'
)
FOUR_ARMS = {"arms": ["plain", "batch", "layer", "group:8"]}
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
def small(compared, tmp_path_factory):
    """A comparison that takes little time, and the folder of its report."""
    comparison = compared(seeds=2, epochs=1)
    folder = tmp_path_factory.mktemp("small")
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
    specs = json.loads(parsed.scripts[0], parse_constant=pytest.fail)["specs"]
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
    assert list(json.loads(parsed.scripts[0])["specs"]) == list(SHOWN)
    assert '"url"' not in parsed.scripts[0]
    (policy,) = [one["content"] for tag, one in parsed.elements if "http-equiv" in one]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_page_is_small_enough_to_send(page):
    assert len(page.encode()) < 2_000_000


def test_the_page_shows_each_chart_as_a_drawing_too(reported, page):
    _, folder = reported
    for name in SHOWN:
        svg = (folder / f"{name}.svg").read_text("utf-8")
        assert f'aria-label="{CHARTS[name]}">{svg}</div></figure>' in page
        assert svg.startswith(f'<svg role="img" aria-label="{CHARTS[name].partition(",")[0]}')


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


def test_what_changes_with_the_run_is_in_two_elements(compared):
    before, after = (compared(missing=missing) for missing in (lambda _: True, lambda _: False))
    shells = []
    for comparison in (before, after):
        text = page_html(comparison)
        text = re.sub(r'(?s)(<main id="report".*?>).*</main>', r"\1</main>", text)
        text = re.sub(r'(?s)(<script type="application/json" id="data">).*?</script>', r"\1", text)
        shells.append(text)
    assert shells[0] == shells[1]


def test_before_anything_is_measured_the_page_says_so(compared):
    nothing = compared(missing=lambda _: True)
    assert Page(page_html(nothing)).texts["answer"] == "No measurements yet; 0 of 12 replicas done."


def test_every_seed_is_drawn_at_first_until_the_study_is_complete(compared):
    part = compared(running=lambda replica: replica.seed > 0)
    for comparison, expected in ((part, True), (compared(), False)):
        (box,) = [
            one
            for tag, one in Page(page_html(comparison)).elements
            if tag == "input" and one["name"] == "seeds"
        ]
        assert ("checked" in box) == expected


def test_the_controls_are_those_of_the_study(page):
    inputs = [one for tag, one in Page(page).elements if tag == "input"]
    names = {name: [one["value"] for one in inputs if one["name"] == name] for name in ("arm", "x")}
    assert names == {"arm": FOUR_ARMS["arms"], "x": ["epochs", "steps", "seconds"]}
    splits = [one["value"] for one in inputs if one["name"] == "split"]
    assert splits == ["training", "validation", "test"]
    ((_, form),) = [one for one in Page(page).elements if one[0] == "form"]
    assert "hidden" in form


def test_the_page_says_how_fast_each_arm_was(small):
    texts = Page((small[1] / "report.html").read_text("utf-8")).texts
    # Each of two replicas: 100 steps in 3 seconds.
    assert "plainnot recorded23 s33batchnot recorded23 s33" in "".join(texts["table"].split("\n"))


def test_the_page_of_a_study_too_large_to_send_leaves_measurements_out(compared, monkeypatch):
    comparison = compared(lr=[0.001, 0.01, 0.1], seeds=4, epochs=20)
    whole = page_html(comparison)
    assert html._LARGEST < 2_000_000
    for less, kept in ((20_000, 8), (100_000, 0)):  # The rates that are reported, or none.
        monkeypatch.setattr(html, "_LARGEST", len(whole.encode()) - less)
        text = page_html(comparison)
        assert len(text.encode()) < len(whole.encode())
        (run,) = json.loads(Page(text).scripts[0])["runs"]
        assert (run["left_out"], len(run["courses"])) == (24 - kept, kept)
