import math
import re

import pytest
import vl_convert

from normlab.report import chart, remarks, write
from normlab.report.charts import with_something_to_show
from normlab.report.sensitivity import chosen_sentence, range_sentences
from normlab.study import Comparison, Study
from normlab.study.ledger import Ledger
from normlab.training import Measurement, Outcome, Setting

RATES = [0.001, 0.01, 0.1, 1.0]
OPEN = [0.945, 0.95, 0.90, 0.90]
CLOSED = [0.90, 0.95, 0.945, 0.90]
NO_INTERVAL = "each seed's own range against plain's, in the rates tried:"


@pytest.fixture
def ended(tmp_path):
    """Writes a run without training, of which `accuracies` gives each arm's by rate, and reads it.

    They are a list for all seeds, or one for each of them; None is a replica that diverged.
    """

    def make(accuracies, *, seeds=6, unfinished=0, **fields):
        rates = fields.pop("lr", RATES)
        study = Study.make(
            {"arms": list(accuracies), "lr": rates, "seeds": seeds, "epochs": 1, **fields}
        )
        last = study.replicas[len(study.replicas) - unfinished :]
        with Ledger.write(tmp_path, study) as ledger:
            ledger.begin_session(workers=1)
            for replica in study.replicas:
                if replica in last:
                    continue
                of_arm = accuracies[replica.arm]
                of_seed = of_arm[replica.seed] if isinstance(of_arm[0], list) else of_arm
                final = of_seed[sorted(rates).index(replica.lr)]
                values = {
                    (split, metric): final if metric == "accuracy" else 1 - final
                    for split in ("train", "validation", "test")
                    for metric in ("accuracy", "loss")
                    if final is not None
                }
                if values:
                    ledger.add(Measurement(replica, 100, 1, values), seconds=1.0)
                ledger.add(Outcome(replica, "done" if values else "diverged", 100, 1.0), 2.0)
        return Comparison(tmp_path)

    return make


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        (CLOSED, "95.00% at lr 0.01, from 0.01 to 0.1 (1 decade)."),
        ([0.9, 0.95, 0.9, 0.9], "95.00% at lr 0.01, at that rate alone (0 decades)."),
        (
            OPEN,
            "95.00% at lr 0.01, from 0.001 to 0.01 (1 decade or more: the rates tried begin "
            "there).",
        ),
        (
            [0.5, 0.95, 0.95, 0.9512],
            "95.12% at lr 1, from 0.01 to 1 (2 decades or more: the rates tried end there).",
        ),
        (
            [0.95] * 4,
            "95.00% at lr 0.001, from 0.001 to 1 (3 decades or more: the rates tried begin and end "
            "there).",
        ),
        (
            [0.95, None, None, None],
            "95.00% at lr 0.001, at that rate alone (0 decades or more: the rates tried begin "
            "there).",
        ),
    ],
)
def test_a_range_in_words(ended, accuracies, expected):
    (told,) = range_sentences(ended({"batch": accuracies}))
    assert told == f"batch is within a point of its best final test accuracy, {expected}"


def test_widths_that_are_not_whole_have_two_digits(ended):
    (told,) = range_sentences(ended({"batch": [0.95, 0.95, 0.9]}, lr=[0.003, 0.01, 0.03]))
    assert "(0.52 decades or more:" in told


def test_an_arm_that_diverged_everywhere_has_no_range(ended):
    plain, batch = range_sentences(ended({"plain": CLOSED, "batch": [None] * 4}))
    assert plain.startswith("plain is within a point")
    assert batch == (
        "batch has no range of learning rates: every replica diverged; not compared with plain's: "
        "in 6 of 6 seeds every replica of batch diverged, in 0 every one of plain."
    )


def test_a_baseline_that_diverged_in_a_seed_is_told(ended):
    plain = [[None] * 4, *[CLOSED] * 5]
    _, batch = range_sentences(ended({"plain": plain, "batch": CLOSED}))
    assert batch.endswith(
        "; not compared with plain's: in 0 of 6 seeds every replica of batch diverged, in 1 every "
        "one of plain."
    )


def test_the_difference_has_its_interval_and_its_n(ended):
    wide, wider = [0.9, 0.95, 0.95, 0.9], [0.9, 0.95, 0.95, 0.95]
    comparison = ended({"plain": CLOSED, "batch": [wide, wide, wider, wider]}, seeds=4)
    _, batch = range_sentences(comparison)
    # The differences are 0, 0, 1 and 1 decades: mean 0.5, t interval of four 0.5 ± 0.9186.
    assert batch.endswith(
        f"; {NO_INTERVAL} +0.50 decades on average (95% interval −0.42 to +1.42; 4 seeds)."
    )


def test_a_difference_that_does_not_vary_has_no_interval(ended):
    narrow = [0.9, 0.95, 0.9, 0.9]
    _, batch = range_sentences(ended({"plain": CLOSED, "batch": narrow}))
    assert batch.endswith(f"; {NO_INTERVAL} −1.00 decades on average (the same in all 6 seeds).")


def test_of_an_unfinished_study_it_is_said_how_far_it_is(ended):
    told = range_sentences(ended({"plain": CLOSED, "batch": OPEN}, seeds=3, unfinished=9))
    assert told[1].endswith("+0.00 decades on average (1 seed).")
    assert told[2] == "So far, from the 1 of 3 seeds that are finished."


@pytest.mark.parametrize("options", [{"lr": 0.01}, {"unfinished": 48, "seeds": 6}])
def test_of_one_rate_or_no_seed_nothing_is_said(ended, options):
    if "lr" in options:
        comparison = ended({"plain": [0.9], "batch": [0.9]}, lr=[options["lr"]])
    else:
        comparison = ended({"plain": CLOSED, "batch": OPEN}, **options)
    assert range_sentences(comparison) == []
    assert chosen_sentence(comparison) == ""


def test_what_was_chosen_is_told_with_its_seeds(ended):
    # Seed 0 alone is better at 1.0, and by so much that the others choose by it.
    batch = [[0.5, 0.5, 0.5, 0.99], *[[0.5, 0.9, 0.5, 0.8]] * 3]
    comparison = ended({"plain": CLOSED, "batch": batch}, seeds=4)
    assert chosen_sentence(comparison) == (
        "Chosen on validation data, for each seed by the others: plain lr 0.01 (4 of 4); "
        "batch lr 0.01 (1 of 4), lr 1 (3 of 4)."
    )
    told = remarks(comparison)
    assert told[:3] == [*range_sentences(comparison), chosen_sentence(comparison)]


def test_a_weight_decay_that_was_chosen_is_told(ended):
    comparison = ended({"plain": [0.9]}, lr=[0.01], weight_decay=[0.1, 0.2], seeds=2)
    assert chosen_sentence(comparison) == (
        "Chosen on validation data, for each seed by the others: "
        f"plain {Setting(0.01, 0.1)} (2 of 2)."
    )
    assert range_sentences(comparison) == []


def parts(spec):
    """Every object in a specification."""
    if isinstance(spec, dict):
        yield spec
        spec = list(spec.values())
    if isinstance(spec, list):
        for value in spec:
            yield from parts(value)


def marks(spec, **properties):
    """The layers whose mark has these properties."""
    return [
        part
        for part in parts(spec)
        if isinstance(part.get("mark"), dict) and properties.items() <= part["mark"].items()
    ]


def rows(spec, key):
    (found,) = [data for data in spec["datasets"].values() if data and key in data[0]]
    return found


MIXED = {
    "plain": [*[[0.90, 0.95, 0.94, 0.5]] * 5, [0.91, 0.96, None, 0.5]],
    "batch": [[0.95, 0.96, 0.97, 0.965], *[[0.95, 0.96, 0.97, 0.967]] * 5],
}


def test_the_lines_are_the_frames_on_a_scale_of_errors(ended):
    comparison = ended(MIXED)
    spec = chart(comparison, "sensitivity").to_dict()
    frame = comparison.sensitivity().query("split == 'test'")
    drawn = rows(spec, "error_mean")
    assert [(one["arm"], one["lr"]) for one in drawn] == [*zip(frame.arm, frame.lr, strict=True)]
    assert [one["mean"] for one in drawn] == list(frame["mean"])
    first = drawn[0]
    assert (first["error_mean"], first["error_low"], first["error_high"]) == pytest.approx(
        tuple(1 - frame.iloc[0][["mean", "low", "high"]].astype(float))
    )
    (line,) = marks(spec, type="line")
    assert (line["encoding"]["x"]["field"], line["encoding"]["y"]["field"]) == ("lr", "error_mean")
    scale = line["encoding"]["y"]["scale"]
    assert (scale["type"], scale["reverse"], scale["nice"]) == ("log", True, False)
    # From the top of batch's band to where plain's lines end, with a little room.
    ends = min(one["error_high"] or 1 for one in drawn) / 1.1, 0.5 * 1.1
    assert scale["domain"] == pytest.approx(ends)
    assert line["encoding"]["y"]["axis"]["labelExpr"] == "format(1 - datum.value, '.3~%')"
    (band,) = marks(spec, type="area")
    fields = [band["encoding"][axis]["field"] for axis in ("x", "y", "y2")]
    assert fields == ["lr", "error_low", "error_high"]


def test_what_diverged_has_a_cross_its_number_and_no_band(ended):
    spec = chart(ended(MIXED), "sensitivity").to_dict()
    (gone,) = [one for one in rows(spec, "error_mean") if one["diverged"]]
    assert (gone["arm"], gone["lr"], gone["told"]) == ("plain", 0.1, "1 of 6")
    assert (gone["low"], gone["error_low"], gone["error_high"]) == (None, None, None)
    (cross,) = marks(spec, type="point", shape="cross")
    assert cross["transform"] == [{"filter": "datum.diverged > 0"}]
    svg = vl_convert.vegalite_to_svg(spec)
    assert svg.count(">1 of 6</text>") == 1
    assert "a replica that diverged counts as accuracy 0; such rates have a cross" in svg
    (plain, batch) = re.findall(r'aria-roledescription="area mark" d="([^"]*)"', svg)
    assert plain.count("M") == 2  # It begins anew behind the gap.
    assert batch.count("M") == 1


def test_the_bars_are_the_ranges(ended):
    comparison = ended(MIXED)
    spec = chart(comparison, "sensitivity").to_dict()
    (plain, batch) = rows(spec, "own_decades")
    assert [plain[key] for key in ("low", "best_lr", "high", "told")] == [
        *(0.01, 0.01, 0.01, "0 decades")
    ]
    assert [batch[key] for key in ("low", "best_lr", "high", "told")] == [
        *(0.01, 0.1, 1.0, "≥ 2 decades")
    ]
    (bar,) = marks(spec, type="rule")
    assert (bar["encoding"]["x"]["field"], bar["encoding"]["x2"]["field"]) == ("low", "high")
    (best,) = marks(spec, type="point", size=90)
    assert best["encoding"]["x"]["field"] == "best_lr"
    (reported,) = marks(spec, shape="diamond")
    assert reported["encoding"]["x"]["field"] == "reported_lr"
    (up,) = marks(spec, shape="triangle-right")
    assert (up["transform"], up["encoding"]["x"]["field"]) == (
        [{"filter": "datum.open_high"}],
        "high",
    )
    (down,) = marks(spec, shape="triangle-left")
    assert (down["transform"], down["encoding"]["x"]["field"]) == (
        [{"filter": "datum.open_low"}],
        "low",
    )


def test_the_rates_are_on_a_logarithmic_axis_and_are_named(ended):
    spec = chart(ended(MIXED), "sensitivity").to_dict()
    axes = [part["encoding"]["x"] for part in parts(spec) if "x" in part.get("encoding", {})]
    assert {axis["scale"]["type"] for axis in axes} == {"log"}
    assert all(axis["axis"]["values"] == RATES for axis in axes)
    low, high = axes[0]["scale"]["domain"]
    assert low < 0.001 < 1.0 < high
    assert spec["resolve"] == {"scale": {"x": "shared"}}


def test_the_chart_says_what_it_shows(ended):
    comparison = ended(MIXED)
    lines = chart(comparison, "sensitivity").to_dict()["title"]["subtitle"]
    said = " ".join(line.strip() for line in lines)
    assert said.startswith(
        "lines: mean final test accuracy of 6 seeds; band: pointwise 95% t interval of the mean"
    )
    for sentence in range_sentences(comparison):
        assert sentence in said


@pytest.mark.parametrize(
    "accuracies",
    [
        {"batch": CLOSED},
        {"plain": [1.0] * 4, "batch": [None] * 4},
        {
            "plain": [[1.0, 0.3, 0.3, 0.1]] * 2,
            "batch": [[0.0, 0.9, 0.2, 0.1], [0.9, 0.1, 0.2, 0.1]],
        },
    ],
    ids=["one arm", "all right and all diverged", "two seeds far apart"],
)
def test_whatever_ended_how_it_can_be_drawn(ended, accuracies):
    seeds = len(accuracies["plain"]) if isinstance(accuracies.get("plain", [0])[0], list) else 6
    spec = chart(ended(accuracies, seeds=seeds), "sensitivity").to_dict(validate=True)
    for one in rows(spec, "error_mean"):
        for end in ("error_mean", "error_low", "error_high"):
            assert one[end] is None or 0 < one[end] <= 1
    svg = vl_convert.vegalite_to_svg(spec)
    assert "NaN" not in svg
    assert "Infinity" not in svg


def test_an_unfinished_study_can_be_drawn(ended):
    comparison = ended({"plain": CLOSED, "batch": OPEN}, unfinished=48)
    assert math.isnan(comparison.sensitivity()["mean"].mean())
    spec = chart(comparison, "sensitivity").to_dict()
    (line,) = marks(spec, type="line")
    assert line["encoding"]["y"]["scale"]["domain"] == pytest.approx([1e-4 / 1.1, 1.1])
    svg = vl_convert.vegalite_to_svg(spec)
    assert "mean final test accuracy of 0 seeds" in svg
    assert "NaN" not in svg


def test_it_is_drawn_of_several_rates_alone(ended, compared, tmp_path):
    several = ended({"batch": CLOSED}, seeds=2)
    assert with_something_to_show(several) == ["accuracy", "loss", "sensitivity"]
    assert with_something_to_show(compared(seeds=2)) == ["accuracy", "loss", "difference"]
    folder = tmp_path / "report"
    page = write(several, folder).read_text("utf-8")
    assert {path.name for path in folder.glob("*.png")} == {
        *("accuracy.png", "loss.png", "sensitivity.png")
    }
    assert (folder / "sensitivity.svg").read_text("utf-8") in page
    assert "from 0.01 to 0.1 (1 decade)." in page
