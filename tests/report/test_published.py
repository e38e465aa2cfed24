import re

from normlab.report import remarks, write
from normlab.report.published import published_sentence, published_table

FIGURES = [
    {"arm": "batch", "metric": "accuracy", "epoch": 4, "value": 0.97},
    {"arm": "batch", "split": "train", "metric": "loss", "epoch": 4, "value": 9.5},
    {"arm": "batch", "metric": "accuracy", "epoch": 40, "value": 0.5},
    {"arm": "batch", "against": "plain", "metric": "accuracy", "epoch": 4, "value": 0.0, "to": 0.5},
]


def cells(comparison):
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", published_table(comparison))
    return {place: re.findall("<td>(.*?)</td>", row) for place, row in rows}


def test_each_figure_has_a_row_in_its_own_unit(compared):
    comparison = compared(published=FIGURES)
    accuracy, loss, absent, difference = cells(comparison).values()
    values = [
        one["value"]
        for one in comparison.frame().to_dict("records")
        if (one["arm"], one["split"], one["metric"], one["epoch"])
        == ("batch", "test", "accuracy", 4)
    ]
    mean = sum(values) / len(values)
    assert len(values) == 6
    assert accuracy[0] == "97.00%"
    assert accuracy[1].startswith(f"{mean:.2%} ± 0.")
    assert accuracy[2] == "6"
    assert accuracy[3] == f"{(mean - 0.97) * 100:+.2f} points".replace("-", "−")
    assert accuracy[5] == "yes"
    assert (loss[0], loss[5]) == ("9.500", "no")
    assert loss[3].startswith("−9.")
    assert absent == ["50.00%", "not measured", "", "", "", ""]
    assert difference[0] == "+0.00 points to +50.00 points"
    assert (difference[3], difference[5]) == ("+0.00 points", "yes")


def test_a_sentence_says_how_many_a_seed_could_have_given(compared):
    comparison = compared(published=FIGURES)
    assert published_sentence(comparison) == (
        "2 of 3 published figures lie inside the 95% interval for one more seed trained as here."
    )
    assert published_sentence(comparison) in remarks(comparison)
    for figure, where in ((FIGURES[0], "inside"), (FIGURES[1], "outside")):
        assert published_sentence(compared(published=[figure])) == (
            f"The published figure lies {where} the 95% interval for one more seed trained as here."
        )
    alone = compared(published=FIGURES, seeds=1)
    assert published_sentence(alone).endswith("two seeds would tell.")
    unmeasured = compared(published=FIGURES[2:3])
    assert published_sentence(unmeasured).startswith("Nothing that the text printed was measured")
    assert not any("published" in one for one in remarks(compared()))


def test_the_page_has_the_table_where_a_text_printed_something(compared, tmp_path):
    told = write(compared(published=FIGURES), tmp_path / "told").read_text("utf-8")
    silent = write(compared(), tmp_path / "silent").read_text("utf-8")
    assert published_table(compared(published=FIGURES)) in told
    assert "What was published" in told
    assert "What was published" not in silent
