"""Signals as functions of observations: what they find at a threshold, and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from normlab.doctor import SIGNALS, THRESHOLDS
from normlab.doctor.batches import labels_of, mixed, part_of
from normlab.doctor.batchsize import accumulation, batch_noise, unsynced
from normlab.doctor.behaviour import by_class, gap, mcnemar_p
from normlab.doctor.finding import MissingError
from normlab.doctor.observations import Answers, Layer, Observations
from normlab.doctor.statistics import drift, shift_of_domain, stale
from normlab.probes import Moments


def moments(mean, var, n=64.0):
    return Moments(*(torch.tensor(each, dtype=torch.float64) for each in (mean, var)), n)


def layer(batches, name="norm", **options):
    module = nn.BatchNorm1d(len(batches[0].mean))
    module.num_batches_tracked.fill_(100)
    return Layer(name, module, False, True, calls=[batches], least=batches[0].n, **options)


def seen(*layers, **options):
    return Observations({each.name: each for each in layers}, **options)


def test_drift_by_hand():
    one = layer([moments([1.0, 0.0], [4.0, 1.0])])
    one.module.eps = 0.0
    z, v = drift(one)
    assert z == pytest.approx(0.95 * 0.5)  # Of 0.5 and 0, the 95th percentile.
    high, low = math.log(4 * 64 / 63), math.log(64 / 63)
    assert v == pytest.approx(low + 0.95 * (high - low))


def test_what_a_batch_is_worth_by_hand():
    """The means 0, 1 and 2 have the unbiased variance 1, and all values 9 + 2/3."""
    assert layer([moments([each], [9.0]) for each in (0.0, 1.0, 2.0)]).worth == pytest.approx(
        29 / 3
    )
    assert layer([moments([0.0], [9.0])] * 2).worth == 64
    assert math.isnan(layer([moments([0.0], [9.0])]).worth)


@pytest.mark.parametrize(
    ("mean", "weight"), [(0.09, None), (0.15, "information"), (0.5, "warning"), (1.5, "error")]
)
def test_stale_statistics_have_three_weights(mean, weight):
    found = list(stale(seen(layer([moments([mean], [1.0], 4096.0)] * 8))))
    assert [each.weight for each in found] == [weight] * (weight is not None)


def test_chance_is_not_called_stale():
    """Eight batches worth 64 values: means that chance moves are let be, in a sample of 300."""
    g = torch.Generator().manual_seed(0)
    weights = []
    for _ in range(300):
        x = torch.randn(8, 64, 10, generator=g, dtype=torch.float64)
        rows = [Moments(each.mean(0), each.var(0, correction=0), 64.0) for each in x]
        weights += [each.weight for each in stale(seen(layer(rows)))]
    assert weights == []


def test_batch_noise_waits_for_evidence():
    def noisy(count):
        g = torch.Generator().manual_seed(0)
        means = torch.randn(count, 50, generator=g, dtype=torch.float64) / math.sqrt(16)
        return layer([Moments(each, torch.ones(50).double(), 512.0) for each in means])

    few, many = noisy(3), noisy(60)
    assert many.worth == pytest.approx(16, rel=0.15)
    assert list(batch_noise(seen(few, batches=3))) == []
    (found,) = batch_noise(seen(many, batches=60))
    assert (found.weight, found.threshold) == ("warning", 32)
    assert many.worth < found.measured < 32
    with pytest.raises(MissingError):
        list(batch_noise(seen(many, batches=1)))


def test_ranks_without_sync_are_noise():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(31, 9, generator=g, dtype=torch.float64)
    rows = [Moments(each, torch.ones(9).double(), 4.0) for each in means]
    plain = layer(rows)
    with pytest.raises(MissingError, match="two ranks"):
        list(unsynced(seen(plain)))
    assert [each.layer for each in unsynced(seen(plain, world_size=4))] == ["norm"]
    plain.module = nn.SyncBatchNorm(9)
    assert list(unsynced(seen(plain, world_size=4))) == []


@pytest.mark.parametrize(
    ("tracked", "found"), [(100, None), (400, 4.0), (401, 4.01), (450, None), (50, None)]
)
def test_updates_a_step(tracked, found):
    one = layer([moments([0.0], [1.0])])
    one.module.num_batches_tracked.fill_(tracked)
    measured = [each.measured for each in accumulation(seen(one, steps=100))]
    assert measured == ([] if found is None else [pytest.approx(found)])
    one.calls *= 4  # Called four times in a forward pass, it is updated four times a step.
    assert list(accumulation(seen(one, steps=100))) == []


def test_the_gap_needs_points_and_significance():
    right = np.arange(1000) < 900

    def of(worse, better):
        evaluated = right.copy()
        evaluated[:worse] = False
        evaluated[1000 - better :] = True
        one = layer([moments([0.0], [1.0])])
        return [each.weight for each in gap(seen(one, answers=Answers(evaluated, right)))]

    assert of(0, 0) == of(9, 0) == of(40, 28) == of(0, 50) == []
    assert of(12, 0) == ["warning"]
    assert of(60, 0) == ["error"]


def test_mcnemar_by_the_binomial():
    one = np.array([True] * 7 + [False] * 2 + [True] * 50)
    other = np.array([False] * 7 + [True] * 2 + [True] * 50)
    by_hand = 2 * sum(math.comb(9, k) for k in (0, 1, 2)) / 2**9
    assert mcnemar_p(one, other) == pytest.approx(by_hand)
    assert mcnemar_p(one, one) == 1.0


def test_the_shift_is_the_divergence_of_normal_distributions():
    g = torch.Generator().manual_seed(0)
    ours = [moments([1.0], [2.0])] * 3
    means = torch.randn(8, 1, generator=g, dtype=torch.float64) / 8
    theirs = [Moments(each, torch.ones(1).double(), 64.0) for each in means]
    (found,) = shift_of_domain(
        seen(layer(ours), evaluated={"norm": ours}, reference={"norm": theirs})
    )
    assert found.measured == pytest.approx((math.log(1 / 2) + (2 + 1) / 1 - 1) / 2, rel=1e-4)
    other = [each._replace(n=32.0) for each in ours]
    with pytest.raises(MissingError, match="same size"):
        list(
            shift_of_domain(
                seen(layer(other), evaluated={"norm": other}, reference={"norm": theirs})
            )
        )


def test_random_orders_are_not_by_class():
    generator = np.random.default_rng(0)
    orders = [np.split(generator.permutation(np.arange(1024) % 10), 8) for _ in range(100)]
    assert not any(by_class(each) for each in orders)
    assert by_class(np.split(np.sort(np.arange(1024) % 10), 8))
    assert not by_class([np.zeros(5, int)] * 3)
    assert not by_class([np.zeros(0, int)] * 3)


def test_samples_are_mixed_with_their_labels():
    batches = [
        {"x": torch.arange(n).float().view(-1, 1) + s, "y": torch.arange(n) + s}
        for n, s in ((3, 0), (2, 3))
    ]
    found = mixed(batches, torch.Generator().manual_seed(0))
    assert [len(each["y"]) for each in found.batches] == [3, 2]
    labels = torch.cat([each["y"] for each in found.batches])
    assert labels.tolist() == found.order.tolist() != [0, 1, 2, 3, 4]
    assert torch.cat([each["x"] for each in found.batches]).flatten().tolist() == labels.tolist()
    assert mixed([torch.ones(2, 3), torch.ones(2, 4)], torch.Generator()) is None
    assert mixed([torch.ones(()), torch.ones(())], torch.Generator()) is None


def test_labels_and_parts_of_batches():
    x, y = torch.ones(4, 2), torch.arange(4)
    assert labels_of((x, y)) is labels_of({"x": x, "y": y}) is y
    assert labels_of(x) is labels_of((x,)) is labels_of((x, "y")) is None
    part = part_of({"x": x, "y": y, "scale": torch.ones(2), "name": "a"}, 3)
    assert [tuple(part[key].shape) for key in ("x", "y", "scale")] == [(3, 2), (3,), (2,)]


def test_every_threshold_says_why_and_whence():
    assert all(each.reason and each.source for each in THRESHOLDS.values())
    assert len(SIGNALS) == 24
