"""The words that numbers get."""

import math

import numpy as np
import pytest
from scipy import stats

from normlab.claims import Part
from normlab.claims.evidence import Evidence, overall, weigh

MORE, EQUAL = Part("a", "more", 0.5), Part("a", "equal", 0.5)
SPREAD = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])  # Standard error 0.7071, so ±1.963 at 95%.
HALF = stats.t.ppf(0.975, 4) * math.sqrt(0.5)


def test_the_interval_is_students():
    found = weigh(MORE, 3 + SPREAD)
    assert found.mean == 3
    assert found.interval == pytest.approx((3 - HALF, 3 + HALF))


def test_the_level_is_divided_among_parts():
    found = weigh(MORE, 3 + SPREAD, parts=5)
    half = stats.t.ppf(1 - 0.005, 4) * math.sqrt(0.5)
    assert found.interval == pytest.approx((3 - half, 3 + half))
    assert found.confidence == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("part", "center", "scale", "word"),
    [
        (MORE, 2.0, 1, "supported"),
        (MORE, 1.9, 1, "inconclusive"),
        (MORE, -2.0, 1, "refuted"),
        (MORE, -1.9, 1, "inconclusive"),
        (MORE, 0.25, 0.1, "refuted"),  # Surely there, and surely too small to matter.
        (MORE, 0.4, 0.1, "supported"),  # Surely there, and perhaps large enough.
        (EQUAL, 0.25, 0.1, "supported"),
        (EQUAL, 0.4, 0.1, "inconclusive"),
        (EQUAL, -0.8, 0.1, "refuted"),
        (EQUAL, 0.8, 0.1, "refuted"),
        (EQUAL, 0.0, 1, "inconclusive"),
    ],
)
def test_words(part, center, scale, word):
    assert weigh(part, center + scale * SPREAD).word == word


def test_exact_is_what_every_seed_is():
    part = Part("a", "exact", 1e-6)
    assert weigh(part, [1e-7, -1e-6]).word == "supported"
    assert weigh(part, [1e-7, -1.1e-6]).word == "refuted"
    found = weigh(part, [0.0, math.nan])
    assert (found.word, found.mean) == ("refuted", None)


def test_few_seeds_decide_nothing():
    found = weigh(MORE, [3.0, 3.1, 2.9, 3.0])
    assert (found.word, found.interval) == ("inconclusive", None)
    assert "too few" in found.reason


def test_values_that_are_all_equal():
    assert weigh(MORE, [1.0] * 5).word == "inconclusive"
    found = weigh(MORE, [1.0] * 6)
    assert (found.word, found.interval) == ("supported", (1.0, 1.0))
    assert weigh(EQUAL, [0.0] * 6).word == "supported"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([math.inf] * 6, "supported"),
        ([math.inf] * 3 + [1.0] * 3, "supported"),
        ([math.inf] * 5, "inconclusive"),
        ([-math.inf] + [-1.0] * 5, "refuted"),
        ([math.nan] * 5 + [1.0] * 5, "inconclusive"),
    ],
)
def test_where_a_replica_failed_the_signs_are_counted(values, word):
    found = weigh(MORE, values)
    assert (found.word, found.mean, found.interval) == (word, None, None)
    assert "sign test" in found.reason


def test_what_failed_is_not_equal_to_anything():
    assert weigh(EQUAL, [math.inf] + [0.0] * 9).word == "inconclusive"


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "inconclusive"], "inconclusive"),
        (["inconclusive", "refuted"], "refuted"),
        (["supported", "refuted"], "refuted"),
    ],
)
def test_a_claim_needs_all_its_parts(words, word):
    evidence = [Evidence(MORE, 10, 0.0, None, 0.95, 0, 0, each) for each in words]
    assert overall(evidence) == word
