"""Claims about trained networks: what they measure, by hand, and what they make of numbers."""

import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from normlab.claims import Row, check, trained
from normlab.claims.catalog import adaptation, dropout_shift, precise_bn
from normlab.training import Replica


def frame_of(rows_by_seed):
    rows = [(seed, *row) for seed, rows in rows_by_seed.items() for row in rows]
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_blur_is_the_double_sum():
    x = torch.rand(1, 2, 7, 6, dtype=torch.float64)
    reach, sigma = 4, 1.5
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)]
    expected = torch.zeros_like(x)
    for i in range(7):
        for j in range(6):
            for di, wi in zip(range(-reach, reach + 1), weights, strict=True):
                for dj, wj in zip(range(-reach, reach + 1), weights, strict=True):
                    row, column = min(max(i + di, 0), 6), min(max(j + dj, 0), 5)
                    share = wi * wj / sum(weights) ** 2
                    expected[0, :, i, j] += share * x[0, :, row, column]
    torch.testing.assert_close(adaptation.blur(x.float()), expected.float(), rtol=0, atol=1e-6)


def test_noise_has_its_deviation_and_stays_in_range():
    x = torch.full((50, 1, 28, 28), 0.5)
    noisy = adaptation.noise(x, torch.Generator().manual_seed(0))
    assert noisy.amin() == 0
    assert noisy.amax() == 1
    inside = noisy[(noisy > 0) & (noisy < 1)] - 0.5
    # A normal's deviation, cut off at ±0.5/0.3.
    cut = torch.distributions.Normal(0.0, 1.0)
    z = torch.tensor(0.5 / 0.3)
    share = 2 * cut.cdf(z) - 1
    expected = 0.3 * (1 - 2 * z * cut.log_prob(z).exp() / share).sqrt()
    assert inside.std().item() == pytest.approx(expected.item(), rel=0.01)


def test_the_shift_of_a_dropout_straight_before_a_norm_is_what_theory_says():
    # ReLU of a standard normal: E a² = 1/2, E a = 1/√(2π). Half of it dropped, Var is 1 − 1/(2π)
    # in training, and 1/2 − 1/(2π) in evaluation.
    torch.manual_seed(0)
    x = torch.randn(40_000, 8)
    network = torch.nn.Sequential(
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.BatchNorm1d(8),
    )
    network[0].running_mean, network[0].running_var = x.mean(0), x.var(0)
    network.train()
    network[3].momentum = None
    network(x)
    found = dropout_shift._shift(network.eval(), x)
    c = 1 / (2 * math.pi)
    assert found == pytest.approx(math.log2((1 - c) / (0.5 - c)), abs=0.02)


def test_each_seed_is_reported_at_the_rate_of_the_others():
    arm = dropout_shift._AFTER
    validation = {0: (0.9, 0.5), 1: (0.5, 0.8), 2: (0.5, 0.8)}
    frame = frame_of(
        {
            seed: [
                Row(arm, quantity, lr, value)
                for quantity in ("validation", "accuracy")
                for lr, value in zip((0.1, 0.3), values, strict=True)
            ]
            for seed, values in validation.items()
        }
    )
    chosen = dropout_shift._chosen(frame)
    rates = chosen.groupby("seed")["at"].unique().map(list).to_dict()
    # Seed 0 would choose 0.1; the two others choose for it. For 1 it is 1.4 against 1.3.
    assert rates == {0: [0.3], 1: [0.1], 2: [0.1]}


def test_a_network_that_diverged_is_never_chosen():
    arm = dropout_shift._AFTER
    rows = [Row(arm, "validation", 0.1, 0.2), Row(arm, "validation", 0.3, math.nan)]
    chosen = dropout_shift._chosen(frame_of(dict.fromkeys(range(3), rows)))
    assert set(chosen["at"]) == {0.1}


def test_what_dropout_shift_makes_of_numbers_and_of_a_network_that_diverged():
    before, after = dropout_shift._BEFORE, dropout_shift._AFTER
    alike = {"validation": 0.9, dropout_shift._SHIFT: 0.5}
    alike |= {dropout_shift._WITH: 0.7, dropout_shift._WITHOUT: 0.75}
    accuracies = {0: (0.7, 0.8), 1: (math.nan, 0.8), 2: (0.7, math.nan)}
    rows = {
        seed: [
            *(Row(before, quantity, 0.1, value) for quantity, value in alike.items()),
            Row(before, "accuracy", 0.1, first),
            Row(after, "validation", 0.1, 0.9),
            Row(after, "accuracy", 0.1, second),
        ]
        for seed, (first, second) in accuracies.items()
    }
    shift, statistics, place = dropout_shift.CLAIM.effects(frame_of(rows)).values()
    assert shift == [0.5] * 3
    assert statistics == pytest.approx([5.0] * 3)
    assert place == [pytest.approx(10.0), math.inf, -math.inf]


def test_what_precise_bn_makes_of_numbers():
    values = dict(zip(precise_bn._SAMPLES, (0.7, 0, 0, 0.79, 0, 0, 0.81, 0.8), strict=True))
    rows = [Row(precise_bn._PRECISE, "accuracy", n, value) for n, value in values.items()]
    rows.append(Row(precise_bn._AVERAGE, "accuracy", 100, 0.1))
    effects = precise_bn.CLAIM.effects(frame_of({0: rows}))
    assert [round(each[0], 6) for each in effects.values()] == [-1.0, 1.0]
    assert [part.name for part in precise_bn.CLAIM.parts] == list(effects)


def test_what_adaptation_makes_of_numbers():
    rows = [
        Row(arm, "accuracy", n, value)
        for arm, values in {
            "clean": {0: 0.9},
            "noise": {0: 0.5, 512: 0.7},
            "blur": {0: 0.6, 512: 0.5},
            "contrast": {0: 0.2, 512: 0.8},
            "clean, one class": {0: 0.9, 512: 0.6},
        }.items()
        for n, value in values.items()
    ]
    effects = adaptation.CLAIM.effects(frame_of({0: rows}))
    assert [round(each[0], 6) for each in effects.values()] == [20.0, -10.0, 60.0, 30.0]
    assert [part.name for part in adaptation.CLAIM.parts] == list(effects)


def test_images_that_are_adapted_to_are_not_those_that_are_judged_by(monkeypatch):
    seen, judged = set(), set()
    labels = SimpleNamespace(labels=torch.arange(100) % 10, classes=10)
    data = SimpleNamespace(indices={"test": torch.arange(100)}, dataset=labels)
    monkeypatch.setattr(adaptation, "fashion", lambda: data)
    monkeypatch.setattr(adaptation, "trained", lambda *_: None)
    monkeypatch.setattr(adaptation, "adapt", lambda network, _: (network, None))
    monkeypatch.setattr(adaptation, "batches", lambda some, _: seen.update(some.tolist()) or [])
    monkeypatch.setattr(
        adaptation, "accuracy", lambda _, some, *__: judged.update(some.tolist()) or 0.5
    )
    adaptation._seen(0, Path())
    assert (len(seen), len(judged), len(seen | judged)) == (50, 50, 100)


@pytest.mark.slow
def test_a_network_is_trained_once_and_kept(tmp_path):
    first = trained.trained(tmp_path, Replica("batch", 0.1, 0))
    (path,) = (tmp_path / "trained").iterdir()
    written = path.stat().st_mtime_ns
    again = trained.trained(tmp_path, Replica("batch", 0.1, 0))
    assert path.stat().st_mtime_ns == written
    assert all(
        a.equal(b) for a, b in zip(*(n.state_dict().values() for n in (first, again)), strict=True)
    )
    assert trained.accuracy(first, trained.fashion().indices["test"]) > 0.8
    trained.trained(tmp_path, Replica("batch", 0.1, 1))
    assert len(list((tmp_path / "trained").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precise-bn", "adaptation", "dropout-shift"])
def test_each_has_a_verdict(name, tmp_path):
    assert check(name, quick=True, out=tmp_path).verdict
