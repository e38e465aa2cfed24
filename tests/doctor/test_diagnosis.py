"""What a diagnosis says, of findings made for it."""

import json
from dataclasses import fields

import pytest

from normlab.doctor import Diagnosis, Finding, LayerNumbers, UnitNumbers


def finding(signal, layer, weight="warning", measured=2.0, threshold=1.0):
    texts = ("why", f"fix {layer}", "source")
    return Finding(signal, layer, weight, "quantity", measured, threshold, *texts)


def diagnosis(*findings, missing=None, numbers=(), units=()):
    return Diagnosis(findings, missing or {}, numbers, units, 4, 2560, None)


NUMBERS = LayerNumbers(
    *("a", "BatchNorm1d", 3, 1, False, 0.1, 60, 64, 9.5, 0.1, 0.2),
    gamma=(0.0, 0.5, 1.0, 1.5, 2.0),
)
UNITS = UnitNumbers("act", "relu", 3, 2560, 0.5, None)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([], "No findings"),
        (["error"], "1 error"),
        (["warning"] * 2, "2 warnings"),
        (["error"] * 2 + ["warning"] + ["information"] * 3, "2 errors, 1 warning, 3 information"),
    ],
)
def test_the_summary_counts_by_weight(weights, said):
    found = diagnosis(*(finding("x", "a", each) for each in weights), numbers=(NUMBERS,))
    assert found.summary == f"{said}; 1 batch norm layers, 2,560 samples in 4 batches"


def test_findings_of_one_signal_and_weight_are_told_together():
    """The one that is farthest out first, by how many thresholds; nothing past a threshold of 0."""
    rows = (("a", 2.0, 1.0), ("b", -9.0, 3.0), ("c", 8.0, 0.0), ("d", 5.0, 4.0), ("e", 6.0, 5.0))
    found = [finding("x", *each[:1], "error", *each[1:]) for each in rows]
    text = str(diagnosis(*found, finding("x", "f"), finding("y", "")))
    assert text.splitlines()[1:] == [
        "",
        "error: x in 5 layers",
        "  b: quantity -9 (threshold 3)",
        "  a: quantity 2 (threshold 1)",
        "  d: quantity 5 (threshold 4)",
        "  and e, c",
        "  why",
        "  fix: fix b",
        "  source: source",
        "",
        "warning: x in f",
        "  quantity 2 (threshold 1)",
        *("  why", "  fix: fix f", "  source: source"),
        "",
        "warning: y",
        "  quantity 2 (threshold 1)",
        *("  why", "  fix: fix ", "  source: source"),
    ]


@pytest.mark.parametrize(("count", "said"), [(6, "and d, e, f"), (7, "and 4 more")])
def test_more_than_six_layers_are_counted(count, said):
    text = str(diagnosis(*(finding("x", each) for each in "abcdefg"[:count])))
    assert f"\n  {said}\n" in text


def test_what_was_not_measured_is_told_where_there_is_any():
    assert str(diagnosis()).splitlines() == [diagnosis().summary]
    assert str(diagnosis(missing={"x": "y"})).splitlines()[1:] == [
        *("", "Not measured, and what it would need:", "  x: y")
    ]


def names(kind):
    return [each.name for each in fields(kind)]


def test_frames_have_a_row_for_each_and_their_columns_where_there_is_none():
    empty = diagnosis()
    full = diagnosis(finding("x", "a"), numbers=(NUMBERS,), units=(UNITS,))
    for get, kind in (
        *((Diagnosis.frame, Finding), (Diagnosis.layers, LayerNumbers)),
        (Diagnosis.activations, UnitNumbers),
    ):
        assert list(get(empty).columns) == list(get(full).columns) == names(kind)
        assert (len(get(empty)), len(get(full))) == (0, 1)
    assert full.frame()["fix"].tolist() == ["fix a"]
    assert full.layers()["worth"].tolist() == [9.5]
    assert full.activations()["dead"].tolist() == [0.5]


def test_all_of_it_is_json():
    found = diagnosis(
        *(finding("x", "a"), finding("y", "b", measured=float("nan"), threshold=float("inf"))),
        missing={"z": "labels"},
        numbers=(NUMBERS,),
        units=(UNITS,),
    )
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    one, two = told.pop("findings")
    assert one == {name: getattr(found.findings[0], name) for name in names(Finding)}
    assert (two["measured"], two["threshold"]) == ("nan", "inf")
    layer = {name: getattr(NUMBERS, name) for name in names(LayerNumbers)}
    assert told == {
        "summary": found.summary,
        "batches": 4,
        "samples": 2560,
        "not_measured": {"z": "labels"},
        "layers": [layer | {"gamma": list(NUMBERS.gamma)}],
        "activations": [{name: getattr(UNITS, name) for name in names(UnitNumbers)}],
    }


def test_a_finding_prints_in_one_line():
    assert str(finding("x", "a")) == "warning: x in a: quantity 2 (threshold 1)"
    assert str(finding("x", "")) == "warning: x: quantity 2 (threshold 1)"
