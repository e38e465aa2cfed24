import re
from dataclasses import replace

import pytest

from normlab.report.intervals import Scale
from normlab.study import Metric, Verdict

ACCURACY = Metric("final_test_accuracy", "accuracy", True, 0.01, "points")
ONE = Verdict(ACCURACY, "batch", "plain", 6, 0.95, 6, 0, (0, 0), 0.01, 0.02, (0.01, 0.03))
LEFT, RIGHT = 8, 172  # Where the ends of a scale are drawn.


def numbers(drawing, tag, *keys):
    """The attributes of each element of a kind."""
    return [
        tuple(float(re.search(rf' {key}="(.*?)"', element)[1]) for key in keys)
        for element in re.findall(rf"<{tag} .*?>", drawing)
    ]


def test_interval_mean_zero_and_margin_stand_on_one_scale():
    scale = Scale.of([ONE])
    assert (scale.low, scale.high, scale.margin) == (-0.01, 0.03, 0.01)
    drawing = scale.row(ONE)
    unit = (RIGHT - LEFT) / 4  # A point of accuracy.
    assert numbers(drawing, "rect", "x", "width") == [(LEFT, 2 * unit)]
    assert numbers(drawing, "line", "x1", "x2") == [
        (LEFT + unit, LEFT + unit),
        (LEFT + 2 * unit, RIGHT),
    ]
    assert numbers(drawing, "circle", "cx") == [(LEFT + 3 * unit,)]


def test_all_rows_fit_on_the_scale_of_all():
    other = replace(ONE, arm="layer", difference=-0.04, interval=(-0.07, -0.01))
    scale = Scale.of([ONE, other])
    assert (scale.low, scale.high) == (-0.07, 0.03)
    assert numbers(scale.row(other), "line", "x1")[1] == (LEFT,)
    assert numbers(scale.row(ONE), "line", "x2")[1] == (RIGHT,)


def test_without_an_interval_there_is_a_dot_and_without_a_margin_no_shade():
    steps = Metric("steps_to_target", "steps", False, None, "steps")
    one = replace(ONE, metric=steps, equivalence_margin=None, difference=-50.0, interval=None)
    drawing = Scale.of([one]).row(one)
    assert numbers(drawing, "circle", "cx") == [(LEFT,)]
    assert numbers(drawing, "rect", "x") == []
    assert len(numbers(drawing, "line", "x1")) == 1


def test_where_there_is_no_difference_nothing_is_drawn():
    failed = replace(ONE, difference=None, interval=None)
    assert Scale.of([failed]) is None
    assert Scale.of([]) is None
    assert Scale.of([ONE, failed]).row(failed) == ""


def test_a_scale_without_extent_is_none():
    assert Scale.of([replace(ONE, difference=0.0, interval=None, equivalence_margin=None)]) is None


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((-0.02, 0.03), ["0", "−2.00", "+3.00"]), ((0.01, 0.2), ["0", "+20.00"])],
)
def test_the_axis_names_its_ends_where_they_do_not_stand_on_the_zero(interval, expected):
    axis = Scale.of([replace(ONE, interval=interval)]).axis()
    assert re.findall(r">([^<>]+)</text>", axis) == expected


def test_a_drawing_is_kept_from_screen_readers_which_have_the_numbers():
    assert 'aria-hidden="true"' in Scale.of([ONE]).row(ONE)
