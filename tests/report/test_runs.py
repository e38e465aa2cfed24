import json
import re
import shutil

import pytest

from normlab.errors import InputError, NormlabError
from normlab.report import headline, runs_html, write_runs
from normlab.report.raw import raw
from normlab.study import Comparison

HOSTILE = "<b>&amp;"


@pytest.fixture(scope="module")
def two(compared):
    """Two runs of studies that differ in arms, epochs and confidence."""
    other = compared(
        arms=["layer", "batch"], epochs=2, confidence=0.9, seeds=5, name="other", noise=0.01
    )
    return [compared(), other]


@pytest.fixture(scope="module")
def page(two):
    return runs_html(two)


def cells(page, row):
    """The texts of the cells of the first row that begins so."""
    (found, *_) = re.findall(rf'<tr><th scope="row">{row}</th>(.*?)</tr>', page, re.DOTALL)
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", found)]


def test_each_arm_has_a_row_with_its_difference_from_its_own_baseline(two, page):
    table = page[page.index("Every run, every arm") : page.index("What the studies differ in")]
    first, second = table.split('scope="rowgroup">')[1:]
    assert first.startswith("made-up: against plain, 95% intervals<")
    assert second.startswith("other: against layer, 90% intervals<")
    assert cells(first, "plain") == ["94.84% ± 0.31", "6", "", "", "", "baseline"]
    assert cells(first, "batch") == ["96.87% ± 0.12", "6", "+2.03", "+1.79 to +2.26", "", "better"]
    (one,) = [one for one in two[1].verdicts if one.metric.name == "final_test_accuracy"]
    shown = cells(second, "batch")
    assert shown[1] == "5"
    assert shown[2] == f"{one.difference * 100:+.2f}".replace("-", "−")
    assert shown[-1] == one.verdict


def test_all_intervals_are_drawn_on_one_scale(page):
    dots = [float(x) for x in re.findall('<circle cx="(.*?)"', page)]
    rows = [one for one in re.findall("<svg class.*?</svg>", page) if "circle" in one]
    zeros = {re.findall('<line x1="(.*?)"', row)[0] for row in rows}
    assert len(dots) == 2
    assert len(zeros) == 1
    ends = [float(x) for row in rows for x in re.findall(r'<line x1="(.*?)"', row)[1:]]
    ends += [float(x) for row in rows for x in re.findall(r' x2="(.*?)"', row)[1:]]
    assert max(ends) == 172.0
    assert min(ends) >= 8.0


def test_the_page_says_that_runs_are_not_judged_against_each_other(two, page):
    assert "No run is judged against another" in page
    answer = re.search('<section class="answer".*?</section>', page, re.DOTALL)[0]
    for comparison in two:
        assert f"<strong>{comparison.study.name}</strong>: {headline(comparison)[0]}" in answer


def test_what_the_studies_differ_in_is_told_field_by_field(page):
    table = page[page.index("What the studies differ in") : page.index("<h2>Curves")]
    fields = re.findall('<th scope="row">(.*?)</th>', table)
    assert fields == ["name", "arms", "seeds", "confidence", "epochs"]
    assert cells(table, "arms") == ["plain, batch", "layer, batch"]
    assert cells(table, "epochs") == ["4", "2"]


def test_the_curves_of_all_runs_are_in_the_page_and_so_are_their_measurements(two, page):
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert list(data["specs"]) == ["accuracy", "loss"]
    rows = max(data["specs"]["accuracy"]["datasets"].values(), key=lambda one: len(one["run"]))
    drawn = set(zip(rows["run"], rows["arm"], strict=True))
    assert drawn == {
        ("made-up", "plain"),
        ("made-up", "batch"),
        ("other", "layer"),
        ("other", "batch"),
    }
    for comparison, run in zip(two, data["runs"], strict=True):
        assert run["run"] == comparison.study.name
        assert len(run["courses"]) == len(comparison.study.replicas)
    assert len(page.encode()) < 2_000_000


def test_runs_of_one_study_are_told_apart_by_their_folders(make_run, tmp_path):
    folder = make_run(seeds=2, epochs=1)
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name)
    page = runs_html([Comparison(tmp_path / name) for name in ("a", "b")])
    assert '<p class="description">made-up (a); made-up (b)</p>' in page
    assert "The studies declare the same." in page


def test_runs_share_the_room_and_studies_do_not_differ_by_their_descriptions(compared, monkeypatch):
    pair = [compared(seeds=2, epochs=1, description=one) for one in ("one", "two")]
    whole = len(json.dumps(raw(pair[0], name="a", room=10**7)))
    for room, left in ((4 * whole, 0), (whole, 4)):
        monkeypatch.setattr("normlab.report.runs.room", lambda *_, room=room: room)
        page = runs_html(pair)
        (text,) = re.findall(r'id="data">(.*?)</script>', page)
        assert [run["left_out"] for run in json.loads(text)["runs"]] == [left, left]
    assert "The studies declare the same." in page


def test_a_run_given_twice_is_refused(compared):
    one = compared(seeds=1, epochs=1)
    with pytest.raises(InputError, match="given 2 times: expected every run once"):
        runs_html([one, one])


def test_a_run_with_nothing_measured_has_its_place(compared):
    page = runs_html([compared(seeds=2, epochs=1), compared(missing=lambda _: True, name="new")])
    assert "<strong>new</strong>: No measurements yet; 0 of 12 replicas done." in page


def test_the_page_is_written_in_one_step_and_a_failure_is_told(two, tmp_path):
    path = write_runs(two, tmp_path / "new")
    assert path == tmp_path / "new" / "runs.html"
    assert [one.name for one in path.parent.iterdir()] == ["runs.html"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NormlabError, match="the page cannot be written"):
        write_runs(two, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_name_of_a_folder_becomes_markup(make_run, tmp_path):
    folder = make_run(seeds=1, epochs=1)
    shutil.copytree(folder, tmp_path / HOSTILE)
    page = runs_html([Comparison(folder), Comparison(tmp_path / HOSTILE)])
    assert HOSTILE not in page
    assert "made-up (&lt;b&gt;&amp;amp;)" in page
