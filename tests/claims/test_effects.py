import math

import pandas as pd

from normlab.claims.effects import contrast, of_arm


def test_a_contrast_says_who_failed():
    nan, inf = math.nan, math.inf
    found = contrast([5.0, 5.0, nan, inf, nan, -inf], [2.0, nan, 2.0, 2.0, nan, inf])
    assert found[:4] == [3.0, inf, -inf, -inf]
    assert all(map(math.isnan, found[4:]))


def test_where_less_is_better_a_failure_is_the_most():
    nan, inf = math.nan, math.inf
    found = contrast([5.0, 5.0, nan, nan], [2.0, nan, 2.0, nan], failed=inf)
    assert found[:3] == [3.0, -inf, inf]
    assert math.isnan(found[3])


def test_values_of_an_arm_come_in_the_order_of_the_seeds():
    rows = [
        (2, "plain", "accuracy", 0, 0.2),
        (1, "plain", "accuracy", 0, 0.1),
        (1, "batch", "accuracy", 0, 0.9),
        (1, "plain", "loss", 0, 3.0),
    ]
    frame = pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])
    assert of_arm(frame, "plain", "accuracy") == [0.1, 0.2]
