import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normlab.claims.catalog import batch_independence, decay_is_rate
from normlab.claims.catalog.batch_independence import companies, dependence
from normlab.claims.catalog.decay_is_rate import trajectory
from normlab.claims.catalog.redundant_bias import bias_share, without_biases
from normlab.claims.catalog.scale_invariance import CLAIM as SCALE
from normlab.claims.catalog.scale_invariance import answers
from normlab.claims.evidence import weigh
from normlab.claims.material import NO_EPS, apart, images, network

COLUMNS = ["seed", "arm", "quantity", "at", "value"]
SMALL = "mlp:6,5"


def test_a_larger_draw_begins_with_a_smaller_one():
    few, labels = images(0, 3)
    more, others = images(0, 5)
    assert few.equal(more[:3])
    assert labels.equal(others[:3])
    assert not images(1, 3)[0].equal(few)


def test_apart_is_relative_to_the_largest():
    assert apart(torch.tensor([2.0, -7.0]), torch.tensor([1.0, -8.0])) == 0.125
    assert math.isnan(apart(torch.tensor([math.nan]), torch.tensor([1.0])))


def test_answers_are_those_of_scaled_weights():
    x, labels = images(0, 7)
    model = network(SMALL, "batch", 0)
    scaled = network(SMALL, "batch", 0)
    with torch.no_grad():
        scaled.hidden0.linear.weight *= 3
        scaled.hidden1.linear.weight *= 3
    wanted = scaled(x.double())
    F.cross_entropy(wanted, labels).backward()
    before = model.hidden1.linear.weight.detach().clone()
    output, *gradients = answers(model, 3.0, x.double(), labels)
    torch.testing.assert_close(output, wanted.detach())
    for name, found in zip(("hidden0", "hidden1"), gradients, strict=True):
        part = getattr(scaled, name).linear.weight.grad
        torch.testing.assert_close(found, 3 * part)
    assert model.hidden1.linear.weight.equal(before)


def test_effects_of_scaling_are_the_worst_of_all_scales():
    rows = [
        (seed, arm, quantity, at, (seed + 1) * at * (10 if quantity == "output" else 1))
        for seed in (1, 0)
        for arm in ("plain", "batch, ε → 0", "batch, ε = 1e-5")
        for quantity in ("output", "gradient")
        for at in (0.1, 3.0)
    ]
    found = list(SCALE.effects(pd.DataFrame(rows, columns=COLUMNS)).values())
    assert found == [pytest.approx(each) for each in ([30, 60], [3, 6], [1, 2])]


def test_the_bias_share_is_that_of_the_worst_layer():
    x, labels = images(0, 7)
    model = network(SMALL, "plain", 0)
    F.cross_entropy(model(x.double()), labels).backward()
    layers = [model.hidden0.linear, model.hidden1.linear]
    wanted = max(float(each.bias.grad.norm() / each.weight.grad.norm()) for each in layers)
    model.zero_grad()
    assert bias_share(model, x.double(), labels) == pytest.approx((wanted, wanted))


def test_a_convolution_s_bias_is_summed_over_positions():
    x, labels = images(0, 4)
    exact, given = bias_share(network("lenet", "plain", 0), x.double(), labels)
    assert exact == pytest.approx(given)
    assert exact > 1e-3


def test_biases_are_taken_from_all_but_the_output():
    model = without_biases(network("lenet", "batch", 0))
    kept = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert [name for name in kept if "norm" not in name] == ["output.bias"]


def by_hand(batches, scale, rates, decay):
    """SGD with decay, torch's own, on the weights of hidden layers."""
    model = network("mlp:128,128,128,128", "batch", 0, eps=NO_EPS)
    hidden = [part.linear.weight for name, part in model.named_children() if "hidden" in name]
    others = [each for each in model.parameters() if all(each is not other for other in hidden)]
    with torch.no_grad():
        for weight in hidden:
            weight.mul_(scale)
    groups = [{"params": hidden, "weight_decay": decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for rate, (x, labels) in zip(rates, batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        output = model(x.double())
        optimizer.zero_grad()
        F.cross_entropy(output, labels).backward()
        optimizer.step()
        yield output.detach()


@pytest.mark.parametrize(("scale", "decay"), [(1.0, 0.0), (2.0, 0.3)])
def test_a_trajectory_is_that_of_torch_s_sgd(scale, decay):
    x, labels = images(0, 3 * 16)
    batches = list(zip(x.split(16), labels.split(16), strict=True))
    rates = [0.1, 0.4, 0.2]
    found = trajectory("batch", 0, batches, rate=rates.__getitem__, decay=decay, scale=scale)
    for one, other in zip(found, by_hand(batches, scale, rates, decay), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_growing_rates_stand_in_for_decay():
    """On a loss of two weights that their scale does not matter to, by hand."""

    def gradient(w):
        return torch.stack([w[1], -w[0]]) * w[0] * w[1] / w.square().sum() ** 2

    with_decay = without = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for step in range(20):
        with_decay = (1 - 0.1 * 0.01) * with_decay - 0.1 * gradient(with_decay)
        without = without - decay_is_rate._growing(step) * gradient(without)
    torch.testing.assert_close(with_decay / with_decay.norm(), without / without.norm())


def test_effects_of_decay_are_the_largest_difference_or_the_last():
    rows = [
        (seed, arm, "", at, value + seed)
        for seed in (1, 0)
        for arm in decay_is_rate._ARMS
        for at, value in ((1, 5.0), (2, 9.0), (3, 7.0))
    ]
    rows[0] = (*rows[0][:4], math.nan)
    found = decay_is_rate.CLAIM.effects(pd.DataFrame(rows, columns=COLUMNS))
    assert list(found.values()) == [[7.0, 8.0], [9.0, 10.0], [9.0, 10.0], [7.0, 8.0]]


def test_a_network_that_breaks_down_is_not_exact():
    rows = [
        (seed, arm, "", at, math.nan if (seed, at) == (1, 2) else 0.0)
        for seed in range(6)
        for arm in decay_is_rate._ARMS
        for at in (1, 2)
    ]
    effects = decay_is_rate.CLAIM.effects(pd.DataFrame(rows, columns=COLUMNS))
    for part in decay_is_rate.CLAIM.parts:
        assert weigh(part, effects[part.name]).word != "supported"
        if part.says == "exact":
            assert weigh(part, effects[part.name]).word == "refuted"


def test_every_company_begins_with_the_sample():
    x, other = torch.rand(2, 4, 3)
    batches = companies(x, other[1:])
    assert [len(each) for each in batches] == [4, 2, 4, 4, 4]
    assert all(each[0].equal(x[0]) for each in batches)
    assert batches[3][1:].equal(1000 * other[1:])
    assert batches[4][1:].isnan().all()


def test_a_layer_that_looks_at_its_batch_is_found_out():
    x, other = torch.rand(2, 4, 3)
    batches = companies(x, other[1:])
    assert dependence(nn.Identity(), x[:1], batches) == 0
    assert math.isnan(dependence(lambda batch: batch - batch.mean(0), x[:1], batches))
    assert dependence(lambda batch: batch - batch.mean(0), x, [x, batches[1], x]) > 0.01


def test_effects_of_batches_are_the_worst_in_evaluation_and_the_least_in_training():
    arms = [part.name for part in batch_independence.CLAIM.parts]
    rows = [
        (seed, arm, quantity, 0, value)
        for seed in (1, 0)
        for arm in arms
        for quantity, value in (("one", 0.25), ("other", math.nan if seed else 0.5))
    ]
    found = batch_independence.CLAIM.effects(pd.DataFrame(rows, columns=COLUMNS))
    assert list(found) == arms
    for arm in arms[:4]:
        assert found[arm][0] == 0.5
        assert math.isnan(found[arm][1])
    assert found[arms[4]][0] == 0.25
