"""Each threshold by itself: what is just short of it is let be, and what is just past it is not."""

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from normlab.doctor import SIGNALS, THRESHOLDS
from normlab.doctor.finding import MissingError
from normlab.doctor.observations import Answers, Layer, Observations
from normlab.probes import Flow, Moments, Units

Case = namedtuple("Case", "weight quantity threshold")
MANY = 4096.0


def moments(mean, var, n=MANY):
    return Moments(*(torch.tensor(each, dtype=torch.float64) for each in (mean, var)), n)


def observed(*rows, module=None, held=False, **options):
    """What is observed of one trained layer whose batches have moments that fit its own."""
    rows = rows or (moments([0.0], [1.0]),) * 8
    module = module or nn.BatchNorm1d(len(rows[0].mean))
    module.num_batches_tracked.fill_(1000)
    least = min(each.n for each in rows)
    layer = Layer("norm", module, held, True, calls=[list(rows)], least=least)
    return Observations({"norm": layer}, batches=len(rows), **options)


def buffers(**values):
    """A layer of as many channels as there are values of each."""
    count = max(map(len, values.values()))
    module = nn.BatchNorm1d(count)
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.tensor(value))
    return module


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
    mixed = np.arange(samples) < 900
    given = mixed.copy()
    given[: round(abs(change) * samples)] = False
    one, other = (given, mixed) if change < 0 else (mixed, given)
    labels = [np.zeros(2, int), np.ones(2, int)]
    return observed(labels=labels, given=one, answers=Answers(other, other))


# What is observed just short of a threshold, and just past it: the weight of what is then found.
CASES = {
    "stale mean": ("stale statistics", stale_by(0.099), None, stale_by(0.101), "information"),
    "stale variance": (
        *("stale statistics", stale_by(ratio=math.exp(-0.199)), None),
        *(stale_by(ratio=math.exp(-0.201)), "information"),
    ),
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
    "shared": ("shared layer", apart(0.499), None, apart(0.501), "warning"),
}


def weight_of(signal, seen):
    try:
        found = [each.weight for each in SIGNALS[signal](seen)]
    except MissingError:
        return MissingError
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize("name", CASES)
def test_a_threshold_is_where_it_says(name):
    signal, short, below, past, above = CASES[name]
    assert (weight_of(signal, short), weight_of(signal, past)) == (below, above)


def test_every_threshold_is_tried():
    """Those of chance, of distributions and of gaps are in test_signals.py."""
    elsewhere = {"gap", "gap error", "significance", "stale errors", "noise", "noise error"}
    elsewhere |= {"noise confidence", "order p", "shift", "shift batches", "growth", "growth total"}
    assert CASES.keys() | elsewhere == THRESHOLDS.keys()


def test_an_order_that_helps_is_told_too():
    (found,) = SIGNALS["order of the data"](ordered(0.05))
    assert (found.measured, found.threshold) == (pytest.approx(0.05), 0.02)


def test_dropout_is_information_once_the_running_variance_is_that_without_it():
    (found,) = SIGNALS["dropout before batch norm"](dropped(-0.5))
    assert (found.weight, found.measured) == ("warning", pytest.approx(-0.5))
    (found,) = SIGNALS["dropout before batch norm"](dropped(-0.5, running=1.0))
    assert (found.weight, found.measured) == ("information", pytest.approx(-0.5))


def test_the_momentum_of_a_frozen_layer_does_nothing():
    module = nn.BatchNorm1d(1, momentum=0.99)
    assert weight_of("momentum convention", observed(module=module)) == "error"
    assert weight_of("momentum convention", observed(module=module, held=True)) is None


def test_frozen_parameters_are_asked_for_in_training():
    seen = observed()
    layer = seen.layers["norm"]
    assert weight_of("frozen yet updating", seen) is None
    layer.frozen_parameters = True
    assert weight_of("frozen yet updating", seen) == "warning"
    layer.training = False
    assert weight_of("frozen yet updating", seen) is MissingError


def test_a_rest_is_dropped_and_batches_that_are_all_small_need_another_norm():
    rest = observed(*[moments([0.0], [1.0], n) for n in (64.0, 64.0, 4.0)])
    assert "drop_last=True" in next(SIGNALS["tiny count"](rest)).fix
    assert "normlab.convert(model, 'layer'" in next(SIGNALS["tiny count"](of_count(4.0))).fix


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
