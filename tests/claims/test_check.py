"""Measuring, keeping and showing claims; with a claim that is made up."""

import json
import math
import sqlite3
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from normlab import claims
from normlab.claims import Claim, Part, Row, check, last, page
from normlab.claims.charts import dots, lines, scatter
from normlab.cli import main
from normlab.errors import InputError, LedgerError

ASKED = []


def measure(work):
    ASKED.append((work.seeds, work.quick))
    for seed in work.seeds:
        yield seed, [Row("batch", "height", 0, 2.0 + seed), Row("plain", "height", 0, 1.0)]


def effects(frame):
    wide = frame.pivot(index="seed", columns="arm", values="value")
    return {"batch − plain": (wide["batch"] - wide["plain"]).tolist()}


MADE_UP = Claim(
    name="made-up",
    statement="Networks with batch norm are taller.",
    source="nobody, never",
    metric="height(batch) − height(plain)",
    published="nothing",
    setup="Made up.",
    parts=(Part("batch − plain", "more", 0.5, "ells"),),
    measure=measure,
    effects=effects,
    chart=lambda frame: dots(frame, title="height", x="ells", arms=["plain", "batch"]),
    seeds=(0, 1, 2, 3, 4),
)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    ASKED.clear()
    monkeypatch.setitem(claims.CLAIMS, "made-up", MADE_UP)


def test_measured_once(tmp_path):
    result = check("made-up", out=tmp_path)
    assert result.verdict == "supported"
    assert result.evidence[0].mean == 3.0
    assert check("made-up", out=tmp_path).frame().equals(result.frame())
    assert ASKED == [((0, 1, 2, 3, 4), False)]


def test_quick_is_kept_apart(tmp_path):
    check("made-up", quick=True, out=tmp_path)
    (known,) = last(["made-up"], out=tmp_path)
    assert known.quick
    assert "fewer steps" in str(known)
    check("made-up", out=tmp_path)
    (known,) = last(["made-up"], out=tmp_path)
    assert not known.quick
    assert [quick for _, quick in ASKED] == [True, False]


def test_a_cheap_claim_is_never_quick(tmp_path, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "made-up", replace(MADE_UP, is_cheap=True))
    assert not check("made-up", quick=True, out=tmp_path).quick


def test_interrupted_it_goes_on_and_has_no_verdict_before_the_end(tmp_path, monkeypatch):
    def stops(work):
        for seed, rows in measure(work):
            if seed == 3:
                raise KeyboardInterrupt
            yield seed, rows

    monkeypatch.setitem(claims.CLAIMS, "made-up", replace(MADE_UP, measure=stops))
    with pytest.raises(KeyboardInterrupt):
        check("made-up", out=tmp_path)
    (half,) = last(["made-up"], out=tmp_path)
    assert (sorted(half.kept), half.verdict, half.evidence) == ([0, 1, 2], None, [])
    assert "3 of 5 seeds" in str(half)
    monkeypatch.setitem(claims.CLAIMS, "made-up", MADE_UP)
    assert check("made-up", out=tmp_path).verdict == "supported"
    assert ASKED[-1] == ((3, 4), False)


def test_what_was_measured_otherwise_does_not_count(tmp_path, monkeypatch):
    check("made-up", out=tmp_path)
    monkeypatch.setitem(claims.CLAIMS, "made-up", replace(MADE_UP, setup="Made up anew."))
    (known,) = last(["made-up"], out=tmp_path)
    assert not known.kept
    check("made-up", out=tmp_path)
    assert len(ASKED) == 2


def test_seeds_that_a_claim_no_longer_rests_on_do_not_count(tmp_path, monkeypatch):
    check("made-up", out=tmp_path)
    monkeypatch.setitem(claims.CLAIMS, "made-up", replace(MADE_UP, seeds=(1, 2, 3, 4, 5)))
    assert sorted(check("made-up", out=tmp_path).kept) == [1, 2, 3, 4, 5]
    assert ASKED[-1] == ((5,), False)


def test_numbers_that_are_not_finite_are_kept(tmp_path, monkeypatch):
    def odd(work):
        for seed in work.seeds:
            yield seed, [Row("batch", "height", 0.5, math.inf), Row("plain", "a", 0, math.nan)]

    odd_one = replace(MADE_UP, measure=odd, effects=lambda _: {"batch − plain": [math.inf] * 5})
    monkeypatch.setitem(claims.CLAIMS, "made-up", odd_one)
    frame = check("made-up", out=tmp_path).frame()
    assert frame["value"].tolist()[::2] == [math.inf] * 5
    assert frame["value"][1::2].isna().all()
    assert frame["at"].tolist()[:2] == [0.5, 0]


@pytest.mark.parametrize("says", ["more", "equal", "exact"])
def test_numbers_that_are_not_finite_are_told_in_words_and_in_json(says, tmp_path, monkeypatch):
    odd_one = replace(
        MADE_UP,
        parts=(Part("batch − plain", says, 0.5),),
        effects=lambda _: {"batch − plain": [1.0] * 4 + [math.nan]},
    )
    monkeypatch.setitem(claims.CLAIMS, "made-up", odd_one)
    result = check("made-up", out=tmp_path)
    assert "nan" not in str(result)
    (found,) = json.loads(json.dumps(result.summary(), allow_nan=False))["evidence"]
    assert found["mean"] is None
    assert found["reason"] in str(result)


def test_nothing_is_measured_twice_at_once(tmp_path, monkeypatch):
    def nested(work):
        check("made-up", out=tmp_path)
        yield from measure(work)

    monkeypatch.setitem(claims.CLAIMS, "made-up", replace(MADE_UP, measure=nested))
    with pytest.raises(InputError, match="in use by another run"):
        check("made-up", out=tmp_path)


def test_a_file_that_is_something_else(tmp_path):
    (tmp_path / "claims.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(LedgerError, match="damaged"):
        check("made-up", out=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / "claims.sqlite") as connection:
        connection.execute("CREATE TABLE mine (a)")
    with pytest.raises(LedgerError, match="no ledger of claims"):
        last(["made-up"], out=other)
    (tmp_path / "file").write_text("")
    for use in (lambda out: check("made-up", out=out), lambda out: last(["made-up"], out=out)):
        with pytest.raises(InputError, match="is a file"):
            use(tmp_path / "file")


def test_a_ledger_that_was_killed_before_it_had_a_table_holds_nothing(tmp_path):
    (tmp_path / "claims.sqlite").touch()
    (known,) = last(["made-up"], out=tmp_path)
    assert not known.kept
    assert check("made-up", out=tmp_path).verdict == "supported"


def test_an_unknown_claim():
    with pytest.raises(InputError, match="did you mean made-up"):
        check("made-upp")


def test_the_page(tmp_path):
    check("made-up", quick=True, out=tmp_path)
    page(last(["made-up", "identity"], out=tmp_path), tmp_path / "claims.md")
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert "**supported**, with fewer steps" in text
    assert "batch − plain: +3.00 ells (+1.04 to +4.96, 95%); matters from 0.5" in text
    assert "not measured" in text
    assert (tmp_path / "images" / "claims" / "made-up.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "images" / "claims" / "identity.png").exists()


def test_the_command(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    main(["claims", "made-up", "--quick", *out])
    assert capsys.readouterr().out.startswith("made-up: supported (5 seeds, quick: fewer steps)")
    main(["claims", *out])
    assert "made-up" in capsys.readouterr().out
    main(["claims", "made-up", "--json", *out, "--page", str(tmp_path / "page.md")])
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)
    assert (found["verdict"], found["quick"]) == ("supported", False)
    assert found["evidence"][0]["interval"] == pytest.approx([1.0368, 4.9632], abs=1e-4)
    assert "Written" in captured.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["made-upp"], "did you mean made-up"),
        (["made-up", "--all"], "choose one"),
        (["--quick"], "name claims, or say --all"),
        (["made-up", "--workers", "0"], "a number above 0"),
    ],
)
def test_bad_input_is_one_line(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["claims", *arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not ASKED


def test_lines_are_means_with_intervals():
    rows = [(seed, "batch", "q", at, at + seed) for seed in (0, 1, 2) for at in (1.0, 2.0)]
    rows.append((3, "batch", "q", 1.0, math.inf))
    frame = pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])
    spec = lines(frame, title="t", x="x", y="y", arms=["batch"]).to_dict()
    (data,) = spec["datasets"].values()
    assert [(each["at"], each["mean"], each["n"]) for each in data] == [(1, 2, 3), (2, 3, 3)]
    assert data[0]["low"] == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    assert spec["title"]["subtitle"].startswith("mean of 3 to 4 seeds")


@pytest.mark.parametrize("draw", [dots, partial(scatter, y="y")])
def test_what_failed_is_not_left_out_in_silence(draw):
    rows = [(seed, "batch", "q", 1.0, float(seed)) for seed in range(3)]
    rows += [(3, "batch", "q", 1.0, math.inf), (4, "batch", "q", 1.0, math.nan)]
    frame = pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])
    told = "; not shown: 2 that failed"
    for some, ending in ((frame, told), (frame[:3], "")):
        spec = draw(some, title="t", x="x", arms=["batch"]).to_dict()
        assert spec["title"]["subtitle"].endswith(ending)
        assert ("not shown" in spec["title"]["subtitle"]) == bool(ending)
