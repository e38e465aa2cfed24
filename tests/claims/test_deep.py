import math

import numpy as np
import pandas as pd
import pytest
import torch

from normlab.claims import deep
from normlab.claims.catalog import gradient_explosion, linear_explosion
from normlab.claims.catalog.gradient_explosion import expected_growth


def by_hand(x, weights, norm, relu):
    """A forward pass in numpy, float64."""
    before, after = [], []
    for weight in weights:
        x = x @ weight.T
        before.append(x)
        if norm:
            x = (x - x.mean(0)) / x.std(0)
        if relu:
            x = np.maximum(x, 0)
        after.append(x)
    return before, after


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_layers_compute_what_is_computed_by_hand(norm, relu):
    x = torch.rand(5, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [each.double() for each in deep.weights(0, 6, 3, gain=2)]
    before, after = by_hand(x.numpy(), [each.numpy() for each in weights], norm, relu)
    found = deep.hidden(x, weights, norm=norm, relu=relu)
    np.testing.assert_allclose(np.stack(found.before), np.stack(before), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.stack(found.after), np.stack(after), rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    weights = [each.double() for each in deep.weights(3, 4, 2, gain=2)]
    found = deep.gradients(3, 5, weights, norm=True, relu=True)
    x, labels = deep.images(3, 5)
    x = x.flatten(1).double().numpy()
    readout = torch.randn(10, 4, generator=deep.stream(3, "claims", "readout")).double().numpy()

    def loss(layer, moved):
        before, _ = by_hand(x, [each.numpy() for each in weights], True, True)
        h = before[layer] + moved
        rest = [np.eye(4), *(each.numpy() for each in weights[layer + 1 :])]
        logits = by_hand(h, rest, True, True)[1][-1] @ readout.T / 2
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.log(shares[np.arange(5), labels.numpy()]).mean()

    for layer in range(2):
        slopes = []
        for place in np.ndindex(5, 4):
            step = np.zeros((5, 4))
            step[place] = 1e-6
            slopes.append((loss(layer, step) - loss(layer, -step)) / 2e-6)
        assert found[layer] == pytest.approx(np.square(slopes).sum(), rel=1e-5)


def test_weights_have_the_variance_that_was_asked_for():
    first, second = deep.weights(0, 300, 2, gain=2)
    assert first.shape == (300, 784)
    assert float(first.var()) == pytest.approx(2 / 784, rel=0.02)
    assert float(second.var()) == pytest.approx(2 / 300, rel=0.02)
    assert deep.weights(0, 300, 2, gain=2)[1].equal(second)
    assert not deep.weights(1, 300, 2, gain=2)[1].equal(second)


def frame(**growth):
    """Gradients that grow by so much a layer between the ends, and wildly at them."""
    rows = []
    for arm, by_seed in growth.items():
        for seed, rate in enumerate(by_seed):
            for layer in range(1, 41):
                wild = 100.0 if not 10 <= layer <= 30 else 1.0
                rows.append((seed, arm, deep.SQUARED, layer, wild * 7 * rate ** (40 - layer)))
    return pd.DataFrame(rows, columns=["seed", "arm", "quantity", "at", "value"])


def test_growth_is_the_slope_between_the_ends():
    rows = frame(one=[1.5, 2.0], other=[1.0, 1.0])
    assert deep.growth(rows, "one") == pytest.approx([1.5, 2.0])
    found = deep.relative(rows.sample(frac=1, random_state=0), {"one": 1.6, "other": 1.0})
    assert found["one"] == pytest.approx([1.5 / 1.6 - 1, 0.25])
    assert found["other"] == pytest.approx([0.0, 0.0])


def test_what_overflows_is_not_taken_for_growth():
    rows = frame(one=[1.5, 1.5])
    rows.loc[(rows["seed"] == 1) & (rows["at"] < 20), "value"] = math.inf
    first, second = deep.growth(rows, "one")
    assert first == pytest.approx(1.5)
    assert not math.isfinite(second)


def test_the_expected_growth_is_that_of_points_on_a_sphere():
    """What theory averages over directions is drawn here, for a batch of 8."""
    size, count = 8, 400_000
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((count, size))
    centered = normal - normal.mean(1, keepdims=True)
    squared = np.square(centered).sum(1)
    u = centered / np.sqrt(squared)[:, None]
    # The kernel that one layer makes of these directions.
    relu = np.sqrt(size) * np.maximum(u, 0)
    kernel = relu.T @ relu / count
    a, b = np.diag(kernel).mean(), (kernel.sum() - np.trace(kernel)) / (size * (size - 1))
    # A gradient of mean zero, through ReLU and norm.
    arriving = generator.standard_normal((count, size))
    arriving -= arriving.mean(1, keepdims=True)
    passed = arriving * (u > 0)
    passed -= passed.mean(1, keepdims=True)
    passed -= u * (u * passed).sum(1, keepdims=True)
    grown = size / ((a - b) * squared) * np.square(passed).sum(1)
    # That does not keep a mean of zero, but norms take away what does not.
    assert grown.mean() / np.square(arriving).sum(1).mean() == pytest.approx(
        expected_growth(size), rel=0.01
    )


def test_with_larger_batches_it_falls_to_the_limit():
    sizes = [expected_growth(size) for size in (8, 32, 128, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx(math.pi / (math.pi - 1), rel=1e-5)


@pytest.mark.parametrize("claim", [gradient_explosion, linear_explosion])
def test_effects_have_the_names_of_the_parts(claim):
    rows = frame(**{arm: [each] * 2 for arm, each in claim._EXPECTED.items()})
    effects = claim.CLAIM.effects(rows)
    assert list(effects) == [part.name for part in claim.CLAIM.parts]
    for values in effects.values():
        assert values == pytest.approx([0.0, 0.0], abs=1e-12)
    assert claim.CLAIM.chart(rows).to_dict()


def test_on_a_logarithmic_axis_intervals_are_those_of_logarithms():
    from normlab.claims.charts import lines

    rows = pd.DataFrame(
        [(seed, "plain", "q", 1, value) for seed, value in enumerate([1.0, 100.0, 0.0])],
        columns=["seed", "arm", "quantity", "at", "value"],
    )
    drawn = lines(rows, title="t", x="x", y="y", arms=["plain"], log_y=True).to_dict()
    (point,) = next(iter(drawn["datasets"].values()))
    assert point["mean"] == pytest.approx(10.0)
    assert 0 < point["low"] < 10 < point["high"]
    assert point["n"] == 2
