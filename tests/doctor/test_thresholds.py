"""Each threshold by itself: what is just short of it is let be, and what is just past it is not."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from normlab.doctor import SIGNALS, THRESHOLDS
from normlab.doctor.behaviour import by_class
from normlab.doctor.finding import MissingError
from normlab.doctor.observations import Answers, Observations
from normlab.probes import Flow, Units

from .conftest import MANY, buffers, moments, observed, weight_of


def stale_by(mean=0.0, ratio=1.0):
    return observed(*[moments([mean], [ratio * (MANY * 8 - 1) / (MANY * 8)])] * 8)


def of_count(n):
    return observed(*[moments([0.0], [1.0], n)] * 3)


def left_after(steps):
    module = nn.BatchNorm1d(1)
    seen = observed(*[moments([2.0], [1.0])] * 8, module=module)
    module.num_batches_tracked.fill_(steps)
    return seen


def momentum(value):
    return observed(module=nn.BatchNorm1d(1, momentum=value))


def units(kind, count, of=100, values=2000, flat=None):
    silent = torch.arange(of) < count
    each = Units(kind, values, silent, torch.where(silent, values if flat is None else flat, 0))
    return observed(units={"place": each})


def small_gamma(count, size):
    weight = [size] * count + [1.0] * (100 - count)
    rows = [moments([0.0] * 100, [1.0] * 100)] * 2
    return observed(*rows, module=buffers(weight=weight))


def variance(times_eps, gamma=1.0):
    return observed(module=buffers(running_var=[times_eps * 1e-5], weight=[gamma]))


def dropped(log_ratio, running=None):
    seen = observed(module=buffers(running_var=[running or math.exp(-log_ratio)]))
    layer = seen.layers["norm"]
    layer.module.eps = 0.0
    layer.dropped = [moments([0.0], [math.exp(-log_ratio)])] * 8
    seen.flow = Flow(dropouts={"norm": ["drop"]})
    return seen


def apart(distance):
    """Two calls whose means are so many deviations of all values apart."""
    seen = observed()
    layer, d = seen.layers["norm"], distance / math.sqrt(1 - distance**2 / 4)
    layer.module.eps = 0.0
    layer.calls = [[moments([each], [1.0])] for each in (0.0, d)]
    return seen


def ordered(change, samples=1000):
    mixed = np.arange(samples) < 0.9 * samples
    given = mixed.copy()
    given[: round(abs(change) * samples)] = False
    one, other = (given, mixed) if change < 0 else (mixed, given)
    labels = [np.zeros(2, int), np.ones(2, int)]
    return observed(labels=labels, given=one, answers=Answers(other, other))


def gap_of(worse, samples=10000):
    """Evaluation has so many samples wrong that are right by the batch."""
    right = np.ones(samples, bool)
    return observed(answers=Answers(np.arange(samples) >= worse, right))


def worth_at_most(limit):
    """Eight batches whose m_eff is below so much with 99%.

    The variance of their means is 8/7·d² and that of all values 1; the χ² of 7 degrees of freedom
    is 18.4753 there, as tables have it.
    """
    square = 18.4753 / (8 * limit)
    means = (math.sqrt(square), -math.sqrt(square)) * 4
    return observed(*[moments([each], [1 - square]) for each in means])


def moved_from(distance, count=101):
    """Batches of a mean, against some of the means 0, .01, …: 99% of those are .99 or less."""
    seen = observed()
    seen.reference = {"norm": [moments([each / 100], [1.0]) for each in range(count)]}
    seen.evaluated = {"norm": [moments([distance], [1.0])]}
    return seen


def growing(total, count):
    """Layers whose gradients are smaller by one factor from each to the next."""
    layers = {}
    for i in range(count):
        (layers[f"{i}"],) = observed().layers.values()
        layers[f"{i}"].gradient = total ** (1 - i / (count - 1))
    return Observations(layers)


# What is observed just short of a threshold, and just past it: the weight of what is then found.
CASES = {
    "stale mean": ("stale statistics", stale_by(0.099), None, stale_by(0.101), "information"),
    "stale variance": (
        *("stale statistics", stale_by(ratio=math.exp(-0.199)), None),
        *(stale_by(ratio=math.exp(-0.201)), "information"),
    ),
    "gap": ("train/eval gap", gap_of(99), None, gap_of(101), "warning"),
    "gap error": ("train/eval gap", gap_of(499), "warning", gap_of(501), "error"),
    # All that differ for one side: p is 2/2⁷ = .016, and 2/2⁸ = .008.
    "significance": ("train/eval gap", gap_of(7, 500), None, gap_of(8, 500), "warning"),
    "stale warning mean": (
        *("stale statistics", stale_by(0.299), "information", stale_by(0.301), "warning"),
    ),
    "stale warning variance": (
        *("stale statistics", stale_by(ratio=math.exp(0.399)), "information"),
        *(stale_by(ratio=math.exp(0.401)), "warning"),
    ),
    "stale error mean": (
        *("stale statistics", stale_by(0.999), "warning", stale_by(1.001), "error"),
    ),
    "stale error variance": (
        *("stale statistics", stale_by(ratio=math.exp(1.385)), "warning"),
        *(stale_by(ratio=math.exp(1.387)), "error"),
    ),
    "noise": ("batch noise", worth_at_most(32.1), None, worth_at_most(31.9), "warning"),
    "noise error": ("batch noise", worth_at_most(8.1), "warning", worth_at_most(7.9), "error"),
    "noise confidence": (
        *("batch noise", worth_at_most(32.001), None),
        *(worth_at_most(31.999), "warning"),
    ),
    "count": ("tiny count", of_count(16.0), None, of_count(15.0), "warning"),
    "count error": ("tiny count", of_count(2.0), "warning", of_count(1.0), "error"),
    "initial": ("momentum against steps", left_after(44), None, left_after(43), "warning"),
    "momentum": ("momentum convention", momentum(0.89), None, momentum(0.9), "error"),
    "dead": ("dead units", units("relu", 10), None, units("relu", 11), "warning"),
    "dead error": ("dead units", units("relu", 40), "warning", units("relu", 41), "error"),
    "dead values": (
        *("dead units", units("relu", 41, values=999), MissingError),
        *(units("relu", 41, values=1000), "error"),
    ),
    "saturated": (
        *("saturated units", units("sigmoid", 20), None, units("sigmoid", 21), "warning"),
    ),
    "saturated share": (
        *("saturated units", units("tanh", 90, flat=1900), None),
        *(units("tanh", 90, flat=1901), "warning"),
    ),
    "collapse": ("γ collapse", small_gamma(30, 0.001), None, small_gamma(31, 0.001), "warning"),
    "collapse gamma": (
        *("γ collapse", small_gamma(99, -0.0101), None, small_gamma(99, 0.0099), "warning"),
    ),
    "variance": ("near-zero variance", variance(10.1), None, variance(9.9), "information"),
    "gain": (
        *("near-zero variance", variance(1.0, 0.446), "information"),
        *(variance(1.0, -0.448), "warning"),
    ),
    "dropout": ("dropout before batch norm", dropped(-0.099), None, dropped(-0.101), "warning"),
    "part": (
        *("evaluation depends on the batch", observed(part=1e-4), None),
        *(observed(part=1.1e-4), "warning"),
    ),
    "order": ("order of the data", ordered(-0.019), None, ordered(-0.021), "warning"),
    "shift": ("shift of domain", moved_from(0.989), None, moved_from(0.991), "warning"),
    "shift batches": (
        *("shift of domain", moved_from(1.0, count=7), MissingError),
        *(moved_from(1.0, count=8), "warning"),
    ),
    # The 88th root of 1e7 is 1.201, and the 89th 1.199.
    "growth": ("gradient explosion", growing(1e7, 90), None, growing(1e7, 89), "error"),
    "growth total": ("gradient explosion", growing(9e5, 50), None, growing(1.1e6, 50), "error"),
    "shared": ("shared layer", apart(0.499), None, apart(0.501), "warning"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_threshold_is_where_it_says(name):
    signal, short, below, past, above = CASES[name]
    assert (weight_of(signal, short), weight_of(signal, past)) == (below, above)


def test_every_threshold_is_tried():
    """Those of chance and of the order of classes have tests of their own below."""
    assert CASES.keys() | {"stale errors", "order p"} == THRESHOLDS.keys()


# Yates' χ² of two batches of 100 that have 67 of one class and 67 of the other is 21.8, and with 68
# it is 24.5; of p = 1e-6 it is 23.9.
@pytest.mark.parametrize(("of_one", "found"), [(67, False), (68, True)])
def test_the_order_of_classes_is_where_it_says(of_one, found):
    first = np.arange(100) < of_one
    assert by_class([first.astype(int), (~first).astype(int)]) is found


def test_an_order_is_worth_nothing_where_chance_explains_it():
    """Seven samples of 300 are more than two points, and p is 2/2⁷; of eight it is 2/2⁸."""
    assert weight_of("order of the data", ordered(-7 / 300, 300)) is None
    assert weight_of("order of the data", ordered(-8 / 300, 300)) == "warning"


def test_an_order_that_helps_is_told_too():
    (found,) = SIGNALS["order of the data"](ordered(0.05))
    assert (found.measured, found.threshold) == (pytest.approx(0.05), 0.02)


def test_dropout_is_information_once_the_running_variance_is_that_without_it():
    (found,) = SIGNALS["dropout before batch norm"](dropped(-0.5))
    assert (found.weight, found.measured) == ("warning", pytest.approx(-0.5))
    (found,) = SIGNALS["dropout before batch norm"](dropped(-0.5, running=1.0))
    assert (found.weight, found.measured) == ("information", pytest.approx(-0.5))


def test_frozen_parameters_are_asked_for_in_training():
    seen = observed()
    layer = seen.layers["norm"]
    assert weight_of("frozen yet updating", seen) is None
    layer.frozen_parameters = True
    assert weight_of("frozen yet updating", seen) == "warning"
    layer.training = False
    assert weight_of("frozen yet updating", seen) is MissingError


def test_batches_that_are_not_finite_are_told_unless_a_layer_is_the_cause():
    seen = observed(broken={"norm": 2})
    (found,) = SIGNALS["not finite"](seen)
    assert (found.layer, found.weight, found.measured) == ("norm", "error", 2)
    seen.layers["norm"].module.running_var[0] = -1
    assert [each.measured for each in SIGNALS["not finite"](seen)] == [1, 2]
    seen.broken["norm"] = seen.batches
    assert [each.measured for each in SIGNALS["not finite"](seen)] == [1]


# Eight batches worth 64 values each: the running mean and theirs have errors of their own, and four
# deviations of the two together, 4·√((a/(2 − a) + 1/8)/64), may be chance; without a momentum the
# running mean is that of the ten batches it saw.
@pytest.mark.parametrize(
    ("momentum", "chance"),
    [(0.1, 4 * math.sqrt((0.1 / 1.9 + 1 / 8) / 64)), (None, 4 * math.sqrt((1 / 10 + 1 / 8) / 64))],
)
def test_what_chance_explains_is_not_stale(momentum, chance):
    def weight(mean=0.0, log_ratio=0.0):
        var = math.exp(-log_ratio) * 511 / 512
        module = nn.BatchNorm1d(1, eps=0.0, momentum=momentum)
        seen = observed(*rows(mean, var), module=module)
        module.num_batches_tracked.fill_(10)
        return weight_of("stale statistics", seen)

    def rows(mean, var):
        return [moments([mean * math.sqrt(var)], [var], 64.0)] * 8

    assert weight(mean=0.99 * chance) is None
    assert weight(mean=1.01 * chance) == "information"
    assert weight(log_ratio=0.99 * chance * math.sqrt(2)) is None
    assert weight(log_ratio=1.01 * chance * math.sqrt(2)) == "information"


def test_the_distance_of_means_is_in_deviations_of_what_is_divided_by():
    seen = observed(*[moments([1.0], [3.0])] * 8, module=nn.BatchNorm1d(1, eps=1.0))
    (found,) = SIGNALS["stale statistics"](seen)
    assert found.measured == pytest.approx(math.log(4 / 2), rel=1e-4)
    seen.layers["norm"].module.running_var.fill_(3.0)
    (found,) = SIGNALS["stale statistics"](seen)
    assert found.measured == pytest.approx(1 / math.sqrt(4))
