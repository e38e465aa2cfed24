import pytest
import vl_convert
from scipy import stats

from normlab.errors import InputError
from normlab.report import CHARTS, chart
from normlab.report.charts import DARK, colors
from normlab.training import Replica, Setting

BATCH_SEED_2 = Replica("batch", 0.01, 2)
CASES = {
    "one arm": {"arms": ["batch"]},
    "one seed": {"seeds": 1},
    "no validation data": {"validation": 0},
    "nothing done yet": {"missing": lambda _: True},
    "one replica is done": {"missing": lambda replica: replica != Replica("plain", 0.01, 0)},
    "all diverged": {"diverged": lambda _: True},
}


def parts(spec):
    """Every object in a specification."""
    if isinstance(spec, dict):
        yield spec
        spec = list(spec.values())
    if isinstance(spec, list):
        for value in spec:
            yield from parts(value)


def rows(spec, *keys):
    """The rows of the data that have these columns."""
    found = [data for data in spec["datasets"].values() if data and set(keys) <= set(data[0])]
    assert len(found) <= 1
    return found[0] if found else []


def layer(spec, mark):
    (found,) = [part for part in parts(spec) if part.get("mark", {}).get("type") == mark]
    return found["encoding"]


def values(comparison, arm, split="test", metric="accuracy", epoch=4):
    frame = comparison.frame()
    chosen = (
        (frame["arm"] == arm)
        & (frame["split"] == split)
        & (frame["metric"] == metric)
        & (frame["epoch"] == epoch)
        & (frame["status"] == "done")
    )
    return frame[chosen].sort_values("seed")["value"].to_numpy()


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_valid_and_can_be_drawn(compared, name):
    spec = chart(compared(), name).to_dict(validate=True)
    assert spec["title"]["text"] == CHARTS[name]
    svg = vl_convert.vegalite_to_svg(spec)
    assert svg.startswith("<svg")
    assert f">{CHARTS[name]}</text>" in svg
    assert "NaN" not in svg


@pytest.mark.parametrize("name", ["accuracy", "difference"])
@pytest.mark.parametrize("case", CASES)
def test_a_study_with_little_to_show_has_its_charts_too(compared, case, name):
    spec = chart(compared(**CASES[case]), name).to_dict()
    svg = vl_convert.vegalite_to_svg(spec)
    assert f">{CHARTS[name]}</text>" in svg
    assert "NaN" not in svg


def test_an_unknown_chart_is_refused(compared):
    with pytest.raises(InputError) as error:
        chart(compared(seeds=1), "acuracy")
    assert str(error.value) == f"unknown chart 'acuracy': known are {', '.join(CHARTS)}"


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_curves_are_those_of_the_comparison(compared, metric):
    comparison = compared(evaluate_every=30)
    curves = comparison.curves(metric)
    names = {"train": "training", "validation": "validation", "test": "test"}
    # Each replica took 3 seconds over 400 steps.
    expected = curves.assign(
        split=curves["split"].map(names),
        epochs=curves["step"] / 100,
        seconds=3.0 / 400 * curves["step"],
    )
    assert len(expected) == 2 * 3 * 16
    assert rows(chart(comparison, metric).to_dict(), "mean") == expected.to_dict("records")


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_line_is_a_mean_over_seeds_and_a_band_its_t_interval(compared, metric):
    comparison = compared(confidence=0.9)
    spec = chart(comparison, metric).to_dict()
    line, band = layer(spec, "line"), layer(spec, "area")
    assert (line["x"]["field"], line["y"]["field"]) == ("epochs", "mean")
    assert (band["x"]["field"], band["y"]["field"]) == ("epochs", "low")
    assert band["y2"]["field"] == "high"
    (last,) = [
        row
        for row in rows(spec, "mean")
        if (row["arm"], row["split"], row["epochs"]) == ("batch", "test", 4)
    ]
    runs = values(comparison, "batch", metric=metric)
    half = stats.t.ppf(0.95, 5) * stats.sem(runs)
    assert last["mean"] == pytest.approx(runs.mean(), rel=1e-12)
    assert last["low"] == pytest.approx(runs.mean() - half, rel=1e-9)
    assert last["high"] == pytest.approx(runs.mean() + half, rel=1e-9)
    assert last["n"] == 6


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_axis_says_what_it_shows(compared, metric):
    axis = layer(chart(compared(seeds=2), metric).to_dict(), "line")["y"]
    assert axis["title"] == metric
    assert (axis["axis"]["format"] == "%") == (metric == "accuracy")
    assert axis["scale"] == {"zero": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "mean of 6 seeds; band: pointwise 95% t interval of the mean"),
        ({"confidence": 0.9}, "mean of 6 seeds; band: pointwise 90% t interval of the mean"),
        (
            {"diverged": lambda replica: replica == BATCH_SEED_2},
            "mean of 5–6 seeds; band: pointwise 95% t interval of the mean",
        ),
    ],
)
def test_the_band_is_named_with_its_n(compared, options, expected):
    assert chart(compared(**options)).to_dict()["title"]["subtitle"][0] == expected


def test_one_seed_is_one_seed_and_has_no_band(compared):
    spec = chart(compared(seeds=1)).to_dict()
    assert {(row["low"], row["high"]) for row in rows(spec, "mean")} == {(None, None)}
    assert spec["title"]["subtitle"][0].startswith("mean of 1 seed;")


def test_panels_stand_in_the_order_of_use(compared):
    assert chart(compared(seeds=2)).to_dict()["facet"]["column"]["sort"] == [
        *("training", "validation", "test")
    ]
    without = chart(compared(seeds=2, validation=0)).to_dict()
    assert without["facet"]["column"]["sort"] == ["training", "test"]


def test_a_run_that_diverged_is_counted_and_not_in_the_mean(compared):
    comparison = compared(diverged=lambda replica: replica == BATCH_SEED_2)
    spec = chart(comparison).to_dict()
    seen = {(row["arm"], row["n"], row["diverged"]) for row in rows(spec, "mean")}
    assert seen == {("plain", 6, 0), ("batch", 5, 1)}
    (first,) = [
        row
        for row in rows(spec, "mean")
        if (row["arm"], row["split"], row["epochs"]) == ("batch", "test", 1)
    ]
    runs = values(comparison, "batch", epoch=1)
    assert len(runs) == 5
    assert first["mean"] == pytest.approx(runs.mean(), rel=1e-12)
    shown = {one.get("title", one["field"]) for one in layer(spec, "line")["tooltip"]}
    assert {"arm", "mean", "low", "high", "seeds", "diverged"} <= shown


def test_an_arm_of_which_no_run_finished_is_not_passed_over(compared):
    spec = chart(compared(diverged=lambda replica: replica.arm == "batch", epochs=2)).to_dict()
    assert {row["arm"] for row in rows(spec, "mean")} == {"plain"}
    assert "diverged, and not in the mean: batch 6 of 6" in vl_convert.vegalite_to_svg(spec)


def test_of_several_rates_the_reported_one_is_drawn(compared):
    comparison = compared(lr=[0.001, 0.01], seeds=3)
    assert comparison.reported == {"plain": Setting(0.01), "batch": Setting(0.01)}
    data = rows(chart(comparison).to_dict(), "mean")
    assert {(row["arm"], row["lr"]) for row in data} == {("plain", 0.01), ("batch", 0.01)}
    assert len(data) == 2 * 3 * 4


def test_an_arm_has_one_colour_and_no_other_arm_has_it(compared):
    comparison = compared(arms=["plain", "batch", "layer", "group:8"], seeds=2)
    palette = colors(comparison)
    assert list(palette) == ["plain", "batch", "layer", "group:8"]
    assert len(set(palette.values())) == 4
    for name in CHARTS:
        spec = chart(comparison, name).to_dict()
        scales = [
            part["color"]["scale"] for part in parts(spec) if "scale" in (part.get("color") or ())
        ]
        assert scales
        for scale in scales:
            assert dict(zip(scale["domain"], scale["range"], strict=True)) == palette


def test_the_legend_is_there_and_picks_an_arm(compared):
    spec = chart(compared(seeds=2)).to_dict()
    (pick,) = spec["params"]
    assert (pick["bind"], pick["select"]["fields"]) == ("legend", ["arm"])
    assert layer(spec, "line")["opacity"]["condition"]["param"] == pick["name"]


def test_the_differences_are_paired_seed_by_seed(compared):
    comparison = compared(arms=["plain", "batch", "group:8"])
    data = rows(chart(comparison, "difference").to_dict(), "difference")
    for arm in ("batch", "group:8"):
        expected = (values(comparison, arm) - values(comparison, "plain")) * 100
        dots = sorted((row["seed"], row["difference"]) for row in data if row["arm"] == arm)
        assert [seed for seed, _ in dots] == [0, 1, 2, 3, 4, 5]
        assert [value for _, value in dots] == pytest.approx(list(expected), abs=1e-9)
    assert {row["arm"] for row in data} == {"batch", "group:8"}


def test_the_mean_difference_has_the_interval_of_its_verdict(compared):
    comparison = compared(arms=["plain", "batch", "group:8"], confidence=0.9)
    spec = chart(comparison, "difference").to_dict()
    means = {row["arm"]: row for row in rows(spec, "mean")}
    assert set(means) == {"batch", "group:8"}
    runs = (values(comparison, "batch") - values(comparison, "plain")) * 100
    half = stats.t.ppf(0.95, 5) * stats.sem(runs)
    ends = [means["batch"][key] for key in ("low", "mean", "high")]
    assert ends == pytest.approx([runs.mean() - half, runs.mean(), runs.mean() + half], rel=1e-9)
    assert "mean and 90% interval" in spec["title"]["subtitle"]


def test_the_margin_is_drawn_and_named(compared):
    spec = chart(compared(margin_accuracy=0.0125), "difference").to_dict()
    assert rows(spec, "from", "to", "zero") == [{"from": -1.25, "to": 1.25, "zero": 0.0}]
    zone = layer(spec, "rect")
    assert (zone["x"]["field"], zone["x2"]["field"]) == ("from", "to")
    subtitle = spec["title"]["subtitle"]
    assert subtitle.endswith("grey: differences declared not to matter (±1.25)")


def test_a_pair_with_a_failed_run_has_no_difference_and_no_mean_is_drawn(compared):
    comparison = compared(diverged=lambda replica: replica == BATCH_SEED_2)
    spec = chart(comparison, "difference").to_dict()
    assert [row["seed"] for row in rows(spec, "difference")] == [0, 1, 3, 4, 5]
    told = "without one, as a replica diverged: batch 1 of 6 seeds"
    assert spec["title"]["subtitle"][1:] == [told]
    assert rows(spec, "mean") == []


def test_a_drawing_has_lines_and_bands_in_the_arms_colours(compared):
    comparison = compared(seeds=3)
    svg = vl_convert.vegalite_to_svg(chart(comparison).to_dict())
    for color in colors(comparison).values():
        assert f'stroke="{color}"' in svg
        assert f'fill="{color}"' in svg


def test_the_seconds_of_a_curve_are_those_of_its_own_arm_and_rate(compared):
    comparison = compared(lr=[0.001, 0.01], seeds=2)
    for row in comparison._replicas:
        row["seconds"] = {"plain": 2.0, "batch": 4.0}[row["arm"]] * (1 + row["seed"])
        row["seconds"] *= 100 if row["lr"] == 0.001 else 1
    data = rows(chart(comparison).to_dict(), "mean")
    ends = {row["arm"]: row["seconds"] for row in data if row["step"] == 400}
    assert ends == pytest.approx({"plain": 3.0, "batch": 6.0})


def test_arms_differ_in_shape_too(compared):
    comparison = compared(arms=["plain", "batch", "layer"], seeds=2)
    shape = layer(chart(comparison).to_dict(), "point")["shape"]
    assert (shape["field"], shape["scale"]["domain"]) == ("arm", ["plain", "batch", "layer"])
    assert len(set(shape["scale"]["range"])) == 3


def test_a_chart_says_in_words_what_it_shows(compared):
    comparison = compared(seeds=2)
    told = {name: chart(comparison, name).to_dict()["description"] for name in CHARTS}
    for metric, form in (("accuracy", ".2%"), ("loss", ".4f")):
        plain, batch = (
            format(values(comparison, arm, metric=metric).mean(), form)
            for arm in ("plain", "batch")
        )
        assert told[metric] == (
            f"{CHARTS[metric]} over epochs, at the end on test data plain {plain}, batch {batch}; "
            "mean of 2 seeds; band: pointwise 95% t interval of the mean."
        )
    assert told["difference"].startswith(
        f"{CHARTS['difference']}. batch against plain on final test accuracy: +"
    )
    empty = chart(compared(missing=lambda _: True)).to_dict()["description"]
    assert empty.startswith("Accuracy over epochs, with nothing to draw yet; ")


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("light", "dark"), DARK.items())
def test_every_colour_is_seen_on_its_page(light, dark):
    assert contrast(light, "#ffffff") >= 3
    assert contrast(dark, "#111827") >= 3
