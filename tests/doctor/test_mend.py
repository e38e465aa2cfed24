"""What is mended, what is left, and that the user's model is not touched."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import normlab
from normlab import diagnose
from normlab.doctor import SIGNALS, Finding
from normlab.errors import InputError


def network():
    """A norm whose running statistics are those of its inputs, but for what chance is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    for _ in range(60):
        model(torch.randn(64, 6))
    return model


def data(mean=0.0, count=4):
    g = torch.Generator().manual_seed(1)
    return [mean + torch.randn(64, 6, generator=g) for _ in range(count)]


def with_findings(diagnosis, *findings):
    texts = ("quantity", 1.0, 0.0, "why", "fix", "source")
    return replace(diagnosis, findings=tuple(Finding(*each, *texts) for each in findings))


@pytest.mark.parametrize(
    ("momentum", "mended"), [(0.9, 0.1), (0.95, 0.05), (0.99, 0.01), (1.0, 0.1), (2.0, 0.1)]
)
def test_momentum_is_turned(momentum, mended):
    model = network()
    model[0].momentum = momentum
    diagnosis = diagnose(model, data())
    assert diagnosis.findings[0].fix == f"model.get_submodule('0').momentum = {mended}"
    fixed = diagnosis.fixed()
    assert fixed.model[0].momentum == mended
    assert fixed.done == (f"0: momentum {mended}", "1 batch norms recalibrated")
    assert model[0].momentum == momentum


# What the documentation of `fixed` names, and what follows from it.
ESTIMATED_ANEW = {
    *("stale statistics", "never updated", "not finite"),
    *("momentum convention", "momentum against steps", "train/eval gap"),
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_statistics_are_estimated_anew_where_that_mends_and_nowhere_else(signal):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = diagnose(model, data())
    fixed = with_findings(diagnosis, (signal, "0", "warning")).fixed()
    if signal in ESTIMATED_ANEW:
        assert fixed.done[-1] == "1 batch norms recalibrated"
        whole = torch.cat(data())
        assert torch.allclose(fixed.model[0].running_mean, whole.mean(0), atol=1e-6)
        assert torch.allclose(fixed.model[0].running_var, whole.var(0))
    else:
        assert (fixed.done, fixed.left) == ((), ())
        assert torch.equal(fixed.model[0].running_mean, before["0.running_mean"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    light = with_findings(diagnosis, (signal, "0", "information")).fixed()
    assert "1 batch norms recalibrated" not in light.done


def test_it_is_told_what_was_and_what_is():
    model = network()
    model[0].running_mean += 9
    model.add_module("spare", nn.BatchNorm1d(3))

    def forward(model, batch):
        return model[1](model[0](batch["image"]))

    batches = [{"image": x} for x in data()]
    found = diagnose(model, batches, forward=forward)
    fixed = found.fixed()
    assert fixed.before is found
    assert isinstance(fixed.after, normlab.Diagnosis)
    assert [each.signal for each in found.findings if each.weight == "error"] == [
        "stale statistics"
    ]
    assert fixed.after.count("error") == 0
    assert fixed.done == ("1 batch norms recalibrated",)
    ((name, _, why),) = (each.partition(": ") for each in fixed.left)
    assert name == "spare"
    assert str(fixed).splitlines() == [
        f"before: {found.summary}",
        "  done: 1 batch norms recalibrated",
        f"  left: spare: {why}",
        f"after: {fixed.after.summary}",
    ]


def test_a_norm_that_is_the_model_is_called_so():
    model = nn.BatchNorm1d(6, momentum=0.99)
    model(torch.cat(data()))
    assert diagnose(model, data()).fixed().done[0] == "the model: momentum 0.01"


def test_what_cannot_be_estimated_is_left_and_said():
    model = network()
    model[0].momentum = 0.99
    batches = data()
    batches[2][0, 0] = float("nan")
    fixed = diagnose(model, batches).fixed()
    assert fixed.model[0].momentum == 0.01
    assert fixed.done == ("0: momentum 0.01",)
    (left,) = fixed.left
    assert left.startswith("recalibrate: ")
    assert "not finite" in left


def by_class():
    """Two classes far apart, each in batches of its own."""
    g = torch.Generator().manual_seed(1)
    return [
        (4 * each + torch.randn(64, 6, generator=g), torch.full((64,), each))
        for each in (0, 0, 1, 1)
    ]


def test_batches_by_class_are_mixed_to_estimate_by():
    """The second norm's statistics are of what the first makes of a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].running_mean.fill_(50.0)
    found = diagnose(model, by_class())
    fixed = found.fixed()
    expected, _ = normlab.recalibrate(model, found.asked.mixed)
    unmixed, _ = normlab.recalibrate(model, by_class())
    assert torch.equal(fixed.model[2].running_var, expected[2].running_var)
    assert not torch.allclose(expected[2].running_var, unmixed[2].running_var, rtol=0.05)
    # Batches that are given are those to estimate by.
    given = fixed.before.fixed([(x, torch.arange(64) % 3) for x in data(7.0)])
    assert torch.allclose(given.model[0].running_mean, torch.cat(data(7.0)).mean(0))
    assert given.after.samples == 256


def test_batches_that_are_none_are_refused():
    found = diagnose(network(), data())
    with pytest.raises(InputError, match=r"^batches: expected an iterable of batches"):
        found.fixed(3)
    used_up = diagnose(network(), iter(data()))
    with pytest.raises(InputError, match=r"used up: fixed\(batches\)$"):
        used_up.fixed()
    with pytest.raises(InputError, match=r"used up: fixed\(batches\)$"):
        found.fixed(iter(data()))
