import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from normlab.report import TerminalTable, html_table, text_table
from normlab.report.table import evidence_table
from normlab.training import Replica

METRICS = [
    "final test accuracy, differences in points",
    "final test loss, differences in nats",
    "test accuracy at the best validation epoch, differences in points",
    "steps to 95% test accuracy, differences in steps",
]


@pytest.fixture(scope="module")
def four(compared):
    return compared(arms=["plain", "batch", "layer", "group:8"])


def lines(comparison, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(TerminalTable(comparison))
    return console.file.getvalue().splitlines()


class Cell:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.text = tag, attributes, ""


class Table(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.bodies, self.caption, self.head = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(Cell(tag, dict(attributes)))
        if tag == "tbody":
            self.bodies.append([])
        elif tag == "tr" and self.bodies:
            self.bodies[-1].append([])

    def handle_endtag(self, tag):
        cell = self.open.pop()
        assert cell.tag == tag
        if tag == "caption":
            self.caption = cell.text
        elif tag in ("th", "td"):
            (self.bodies[-1][-1] if self.bodies else self.head).append(cell)

    def handle_data(self, data):
        if self.open:
            self.open[-1].text += data


CASES = {
    "better": {},
    "worse": {"arms": ["batch", "plain"]},
    "inconclusive": {"noise": 0.02},
    "no number of seeds": {"diverged": lambda replica: replica == Replica("batch", 0.01, 2)},
    "all diverged": {"diverged": lambda replica: replica.arm == "batch"},
    "incomplete": {"missing": lambda replica: replica.seed > 3},
    "nothing yet": {"missing": lambda _: True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_terminal_table_fits_80_columns_and_keeps_every_word_whole(compared, case):
    comparison = compared(**CASES[case])
    table = lines(comparison)
    assert max(map(len, table)) <= 80
    wide = " ".join(" ".join(lines(comparison, width=200)).split()).split()
    narrow = " ".join(table).split()
    assert sorted(narrow) == sorted(wide)


def test_the_terminal_table_has_every_metric_arm_and_verdict(compared):
    table = lines(compared())
    assert table[0].split() == [
        *("arm", "mean", "±", "sd", "difference", "95%", "interval", "p", "(Holm)", "verdict")
    ]
    blocks = {table[i].rstrip(): table[i + 1 : i + 3] for i in range(1, len(table), 3)}
    assert list(blocks) == METRICS
    for plain, batch in blocks.values():
        assert plain.split()[0] == "plain"
        assert plain.split()[-1] == "baseline"
        assert batch.split()[0] == "batch"
        assert batch.split()[-1] == "better"
    cells = " ".join(blocks[METRICS[0]][1].split())
    assert cells == "batch 96.87% ± 0.12 +2.03 +1.79 to +2.26 < .001 better"


def test_the_columns_of_all_metrics_are_aligned(compared):
    table = lines(compared())
    column = table[0].index("verdict")
    rows = [line for line in table if line.startswith(("plain", "batch"))]
    assert {line[column - 1] for line in rows} == {" "}
    assert {line[column:].split()[0] for line in rows} == {"baseline", "better"}


def test_better_is_green_and_worse_is_red(four):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(TerminalTable(four))
    text = console.file.getvalue()
    assert "\x1b[32mbetter" in text
    assert "\x1b[31mworse" in text


def test_the_text_table_is_plain(four):
    text = text_table(four)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 110
    for expected in (*METRICS, "plain", "batch", "layer", "group:8", "better", "worse"):
        assert expected in text
    assert "…" not in text


def test_the_html_table_is_well_formed_and_labelled(four):
    table = Table(html_table(four))
    assert table.caption == "Each arm against the baseline, over seeds"
    assert [cell.text for cell in table.head] == [
        *("arm", "mean ± sd", "difference", "95% interval", "drawn", "p (Holm)", "verdict")
    ]
    assert {cell.attributes["scope"] for cell in table.head} == {"col"}
    assert [body[0][0].text for body in table.bodies] == METRICS
    for body in table.bodies:
        (title, axis, *empty), *rows = body
        assert title.attributes == {"colspan": "4", "scope": "rowgroup"}
        assert axis.attributes == {"class": "axis"}
        assert [cell.text for cell in empty] == ["", ""]
        assert [row[0].text for row in rows] == ["plain", "batch", "layer", "group:8"]
        for row in rows:
            assert [cell.tag for cell in row] == ["th", *["td"] * 6]
            assert row[0].attributes == {"scope": "row"}


def test_the_html_table_shows_and_marks_the_verdicts(four):
    table = Table(html_table(four))
    plain, batch, layer, group = ([cell.text for cell in row] for row in table.bodies[0][1:])
    assert plain == ["plain", "94.84% ± 0.31", "", "", "", "", "baseline"]
    assert batch == ["batch", "96.87% ± 0.12", "+2.03", "+1.79 to +2.26", "", "< .001", "better"]
    assert layer[2:] == ["+0.07", "−0.33 to +0.48", "", ".655", "inconclusive"]
    assert group[-1] == "worse"
    assert "<td>&lt; .001</td>" in html_table(four)
    assert table.bodies[3][2][5].text == ".094"  # .031, as one of three comparisons.
    marks = [row[-1].attributes["class"] for row in table.bodies[0][1:]]
    assert marks == ["baseline", "better", "inconclusive", "worse"]
    sized = [one for one in four.verdicts if one.difference is not None]
    assert html_table(four).count("<circle") == len(sized) > 0


def test_without_validation_data_there_is_no_metric_of_it(compared):
    table = Table(html_table(compared(validation=0)))
    assert [body[0][0].text for body in table.bodies] == [METRICS[0], METRICS[1], METRICS[3]]


def test_no_text_of_an_arm_becomes_markup(compared):
    comparison = compared(seeds=1)
    arms = ("plain", "<b>&</b>", "[red]x[/red]")
    comparison.study = comparison.study.model_copy(update={"arms": arms})
    assert [row[0].text for row in Table(html_table(comparison)).bodies[0][1:]] == list(arms)
    assert "<b>&</b>" not in html_table(comparison)
    assert "[red]x[/red]" in text_table(comparison)


def test_the_declared_target_is_in_the_title(compared):
    text = text_table(compared(target_accuracy=0.925, seeds=5))
    assert "steps to 92.5% test accuracy, differences in steps" in text


def test_the_evidence_has_a_row_for_each_verdict(compared):
    comparison = compared(arms=["plain", "batch", "layer"], confidence=0.99, seeds=7)
    table = Table(evidence_table(comparison))
    assert table.caption == "The tests behind the verdicts"
    assert [cell.text for cell in table.head] == [
        *("arm", "pairs", "effect size d_z", "seeds improved", "correlation", "p, t test"),
        *("p, sign flips", "p, equivalence (Holm)", "margin", "more seeds"),
    ]
    assert {cell.attributes["scope"] for cell in table.head} == {"col"}
    assert [body[0][0].text for body in table.bodies] == [one.split(",")[0] for one in METRICS]
    for body in table.bodies:
        (title,), *rows = body
        assert title.attributes == {"colspan": "10", "scope": "rowgroup"}
        assert [row[0].text for row in rows] == ["batch", "layer"]
        assert {len(row) for row in rows} == {10}
    accuracy, batch = comparison.verdicts[0], [cell.text for cell in table.bodies[0][1]]
    assert batch[1:6] == [
        *("7", f"+{accuracy.effect_size:.2f}", "100%", f"+{accuracy.correlation:.2f}", "< .001")
    ]
    assert batch[6:] == [".016 (never under .016)", "> .999", "±0.50", ""]
    loss = [cell.text for cell in table.bodies[1][1]]
    assert loss[2] == f"−{accuracy.effect_size:.2f}"
    assert loss[8] == "±0.0200"
    assert comparison.verdicts[1].seeds_needed > 0
    more = f"about {comparison.verdicts[1].seeds_needed}"
    assert [cell.text for cell in table.bodies[0][2]][9] == more


def test_the_evidence_names_the_sign_test_and_the_remarks(compared):
    comparison = compared(diverged=lambda replica: replica == Replica("batch", 0.01, 2))
    row = [cell.text for cell in Table(evidence_table(comparison)).bodies[0][1]]
    assert row[1:6] == ["6", "", "83%", "", ".219 (sign test)"]
    assert row[6:10] == ["", "", "±0.50", "about 11"]
    assert len(row) == 10


@pytest.mark.parametrize("done", [0, 3])
def test_the_evidence_of_an_incomplete_study_does_not_count_seeds(compared, done):
    comparison = compared(missing=lambda replica: replica.seed >= done)
    for body in Table(evidence_table(comparison)).bodies:
        assert [cell.text for cell in body[1]][9] == ""


@pytest.mark.parametrize(
    ("confidence", "expected"), [(0.9, "90%"), (0.975, "97.5%"), (0.999, "99.9%")]
)
def test_the_heading_names_the_confidence_that_was_declared(compared, confidence, expected):
    comparison = compared(confidence=confidence, missing=lambda _: True)
    assert f"{expected} interval" in lines(comparison)[0]


def test_the_evidence_names_the_sign_test_where_all_differences_are_equal(compared):
    comparison = compared(target_accuracy=0.1)
    (steps,) = (one for one in comparison.verdicts if one.metric.name == "steps_to_target")
    assert (steps.interval, steps.failed) == (None, (0, 0))
    cells = [cell.text for cell in Table(evidence_table(comparison)).bodies[-1][1]]
    assert cells[5].endswith(" (sign test)")
