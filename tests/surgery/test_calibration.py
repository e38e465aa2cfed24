import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.surgery import convert
from normlab.surgery.calibration import co_moments

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batches(channels=4):
    return [5 + randn(n, channels, 3, 3, seed=n) for n in (2, 5, 3)]


def batch_norm():
    layer = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        layer.weight.copy_(randn(4, seed=1))
        layer.bias.copy_(randn(4, seed=2))
        layer.running_mean.copy_(5 + randn(4, seed=3))
        layer.running_var.copy_(1 + randn(4, seed=4) ** 2)
    return layer


@settings(deadline=None)  # The first call of a process loads what it needs.
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(-1e6, 1e6))
def test_merged_moments_are_those_of_all(sizes, offset):
    pairs = [
        (offset + randn(n, 2, 3, seed=i), randn(n, 2, 3, seed=-i)) for i, n in enumerate(sizes)
    ]
    merged = None
    for pair in pairs:
        found = co_moments(*pair)
        merged = found if merged is None else merged.merged(found)
    whole = co_moments(*(torch.cat(each) for each in zip(*pairs, strict=True)))
    assert merged.n == whole.n == 3 * sum(sizes)
    for one, other in zip(merged[1:], whole[1:], strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def least_squares(x, y):
    """γ, β and R² per channel by a solver that knows no moments."""
    fits, left, total = [], 0, 0
    for channel in range(x.shape[1]):
        a, b = x[:, channel].reshape(-1), y[:, channel].reshape(-1)
        design = torch.stack([a, torch.ones_like(a)], 1)
        fit = torch.linalg.lstsq(design, b).solution
        fits.append(fit)
        left += (b - design @ fit).square().sum()
        total += (b - b.mean()).square().sum()
    return torch.stack(fits), float(1 - left / total)


@pytest.mark.parametrize("kind", ["group:2", "layer", "instance"])
def test_one_layer_is_fit_by_least_squares(kind):
    model = nn.Sequential(batch_norm())
    x = torch.cat(batches())
    groups = {"group:2": 2, "layer": 1, "instance": 4}[kind]
    normal = nn.functional.group_norm(x, groups)
    with torch.no_grad():
        y = model.eval()(x)
        fits, explained = least_squares(normal, y)
        converted, report = convert(model, kind, calibrate=batches())
        assert_close(converted[0].weight, fits[:, 0], **EXACT)
        assert_close(converted[0].bias, fits[:, 1], **EXACT)
        assert report.explained["0"] == pytest.approx(explained)
        error = (converted(x) - y).norm() / y.norm()
        assert report.error == pytest.approx(float(error))
        plain, _ = convert(model, kind, example=x)
        error = (plain(x) - y).norm() / y.norm()
    assert report.uncalibrated == pytest.approx(float(error))
    assert report.error < report.uncalibrated
    assert f"outputs changed by {report.error:.2%}; by {report.uncalibrated:.2%} without" in str(
        report
    )


def test_rms_norm_has_no_shift_to_fit():
    model = nn.Sequential(batch_norm())
    x = torch.cat(batches())
    normal = x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        y = model.eval()(x)
        converted, report = convert(model, "rms", calibrate=batches())
    expected = (y * normal).sum((0, 2, 3)) / normal.square().sum((0, 2, 3))
    assert_close(converted[0].weight.detach(), expected, **EXACT)
    left = (y - normal * expected.view(-1, 1, 1)).square().sum()
    total = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert report.explained["0"] == pytest.approx(float(1 - left / total))


def test_a_scale_and_shift_are_what_a_batch_norm_is_in_evaluation():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), batch_norm(), nn.ReLU()).double()
    converted, report = convert(model, "none", calibrate=batches())
    assert report.error < 1e-12
    assert report.explained["1"] == pytest.approx(1)
    layer = model[1]
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    assert_close(converted[1].weight, scale, **EXACT)
    assert_close(converted[1].bias, layer.bias - layer.running_mean * scale, **EXACT)
    assert repr(converted[1]) == "ChannelScale(4)"
    back, _ = convert(converted, "torch-batch")
    assert back[1].state_dict().keys() == layer.state_dict().keys()
    assert all(value.equal(layer.state_dict()[key]) for key, value in back[1].state_dict().items())


@pytest.mark.parametrize("kind", ["batch", "torch-batch", "sync", "ghost:2"])
def test_a_batch_norm_in_anothers_place_has_the_statistics_of_the_batches(kind):
    model = nn.Sequential(nn.GroupNorm(2, 4)).double()
    x = torch.cat(batches())
    converted, report = convert(model, kind, calibrate=batches())
    layer = converted[0]
    assert_close(layer.running_mean, x.mean((0, 2, 3)), **EXACT)
    assert_close(layer.running_var, x.var((0, 2, 3)), **EXACT)
    assert layer.num_batches_tracked == 3
    shape = (-1, 1, 1)
    normal = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + 1e-5).sqrt()
    fits, explained = least_squares(normal, model(x).detach())
    assert_close(torch.stack([layer.weight, layer.bias], 1).detach(), fits, **EXACT)
    assert report.explained["0"] == pytest.approx(explained)


def test_each_layer_makes_up_for_those_before_it():
    """Layer by layer, by hand: what the second is fit on has gone through the first, as fit."""
    model = nn.Sequential(batch_norm(), nn.Sigmoid(), nn.Conv2d(4, 4, 2), batch_norm()).double()
    model.eval()
    x = torch.cat(batches())
    with torch.no_grad():
        converted, _ = convert(model, "group:2", calibrate=batches())
        first, _ = least_squares(nn.functional.group_norm(x, 2), model[0](x))
        hidden = nn.functional.group_norm(x, 2, first[:, 0].clone(), first[:, 1].clone())
        hidden = model[2](hidden.sigmoid())
        second, _ = least_squares(nn.functional.group_norm(hidden, 2), model(x))
    assert_close(converted[3].weight, nn.Parameter(second[:, 0]), **EXACT)
    assert_close(converted[3].bias, nn.Parameter(second[:, 1]), **EXACT)


class Backwards(nn.Module):
    """Calls its layers in another order than it has them, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.unused = batch_norm(), batch_norm(), batch_norm()

    def forward(self, x):
        return self.last(self.first(self.first(x)).sigmoid())


def test_layers_are_fit_in_order_of_their_calls():
    model = Backwards().eval()
    converted, report = convert(model, "group:2", calibrate=batches())
    assert list(report.explained) == ["first", "last"]
    assert converted.unused.weight.equal(model.unused.weight)
    x = torch.cat(batches())
    with torch.no_grad():
        inputs = torch.cat([x, model.first(x)])
        # Its own first output is what it is called with again, before it is fit.
        unfit = nn.functional.group_norm(x, 2, model.first.weight, model.first.bias)
        news = nn.functional.group_norm(torch.cat([x, unfit]), 2)
        fits, _ = least_squares(news, model.first(inputs))
    assert_close(converted.first.weight.detach(), fits[:, 0], **EXACT)


def test_what_is_fit_is_new_and_what_was_there_comes_back():
    model = nn.Sequential(batch_norm(), batch_norm())
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    held = model[0].weight
    result, report = convert(model, "layer", calibrate=batches(), inplace=True)
    assert result is model
    assert held.equal(before["0.weight"])
    assert not model[0].weight.equal(model[1].weight)
    assert not model[0].bias.requires_grad
    assert "weight, bias" in report.kept["0"]
    convert(model, "torch-batch", inplace=True)
    assert model[0].weight is model[1].weight is held
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_activations_are_left_out_and_residuals_too():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normlab.BatchNorm2d(4, activation="relu").double()

        def forward(self, x):
            return self.norm(x, 2 * x)

    model = Adds()
    x = torch.cat(batches())
    bare = copy.deepcopy(model.norm).eval()
    bare.activation = None
    fits, _ = least_squares(nn.functional.group_norm(x, 2), bare(x).detach())
    converted, _ = convert(model, "group:2", calibrate=batches())
    assert_close(converted.norm.weight.detach(), fits[:, 0], **EXACT)


def test_between_batch_norms_there_is_nothing_to_fit():
    model = nn.Sequential(batch_norm())
    converted, report = convert(model, "ghost:2", calibrate=batches())
    assert not report.explained
    assert report.error < 1e-12
    assert converted[0].weight.equal(model[0].weight)
    counting = nn.Sequential(normlab.BatchNorm2d(4, finite_guard=True)).double()
    there, _ = convert(counting, "torch-batch")
    _, report = convert(there, "batch", calibrate=batches())
    assert report.returned == {"0": "num_batches_skipped"}


def test_a_constant_channel_has_its_mean():
    model = nn.Sequential(batch_norm())
    x = torch.cat(batches())
    x[:, 1] = 2
    with torch.no_grad():
        expected = model.eval()(x)[0, 1, 0, 0]
    converted, _ = convert(model, "instance", calibrate=[x])
    assert converted[0].weight[1] == 0
    assert_close(converted[0].bias[1].detach(), expected, **EXACT)


def test_batches_may_come_once_and_as_a_loader_yields_them():
    model = nn.Sequential(batch_norm())
    lists, _ = convert(model, "layer", calibrate=batches())
    once, _ = convert(model, "layer", calibrate=((each, "label") for each in batches()))
    assert once[0].weight.equal(lists[0].weight)
    example = randn(2, 4, 3, 3)
    both, _ = convert(model, "layer", example=example, calibrate=batches())
    assert both[0].weight.equal(lists[0].weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibrate has no batches: expected at least one"),
        (torch.ones(2, 4, 3, 3), r"calibrate is a Tensor: expected batches, as in calibrate="),
        ({"x": 1}, "calibrate is a dict"),
        ("batches", "calibrate is a str"),
        ([3], "a batch is a int"),
    ],
    ids=str,
)
def test_batches_that_cannot_be_used(given, message):
    with pytest.raises(InputError, match=message):
        convert(nn.Sequential(batch_norm()), "layer", calibrate=given)


def test_errors_of_models_without_tensors_or_without_size():
    class Nothing(nn.Sequential):
        def forward(self, x):
            super().forward(x)

    assert convert(Nothing(batch_norm()), "layer", calibrate=batches())[1].error is None

    class Zero(nn.Sequential):
        def forward(self, x):
            return {"out": (0 * super().forward(x), 3)}

    report = convert(Zero(batch_norm()), "layer", calibrate=batches())[1]
    assert report.error == 0
    assert not math.isnan(report.explained["0"])


def test_a_fit_is_of_the_layer_without_its_hooks():
    """They act in both models alike."""
    plain, hooked = nn.Sequential(batch_norm()), nn.Sequential(batch_norm())
    hooked[0].register_forward_hook(lambda *given: 3 * given[-1])
    fits = [convert(each, "group:2", calibrate=batches())[0][0] for each in (plain, hooked)]
    assert_close(fits[0].weight, fits[1].weight, **EXACT)
    assert_close(fits[0].bias, fits[1].bias, **EXACT)


def test_a_fit_is_of_what_a_layer_got_when_it_was_called():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batch_norm()

        def forward(self, x):
            x = x.clone()
            y = self.norm(x)
            x.zero_()
            return y

    model = Overwriting().eval()
    plain, report = convert(nn.Sequential(model.norm), "group:2", calibrate=batches())
    found, again = convert(model, "group:2", calibrate=batches())
    assert_close(found.norm.weight, plain[0].weight, **EXACT)
    assert again.explained == {"norm": report.explained["0"]}


@pytest.mark.parametrize("training", [False, True])
def test_a_fit_is_of_evaluation(training):
    model = nn.Sequential(nn.Dropout(), batch_norm()).train(training)
    converted, report = convert(model, "group:2", calibrate=batches())
    alone, expected = convert(
        nn.Sequential(nn.Identity(), batch_norm()), "group:2", calibrate=batches()
    )
    assert_close(converted[1].weight, alone[1].weight, **EXACT)
    assert (report.error, report.uncalibrated) == (
        pytest.approx(expected.error),
        pytest.approx(expected.uncalibrated),
    )
    assert [each.training for each in converted] == [training] * 2


def test_an_output_that_never_varies_is_explained():
    model = nn.Sequential(batch_norm())
    nn.init.zeros_(model[0].weight)
    _, report = convert(model, "group:2", calibrate=batches())
    assert report.explained == {"0": 1.0}


def test_values_that_are_not_finite_are_refused_and_the_model_stays():
    broken = batches()
    broken[1][0, 0, 0, 0] = math.nan
    model = nn.Sequential(batch_norm())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"^0: batch 2 of calibrate has values there that are not"):
        convert(model, "group:2", calibrate=broken, inplace=True)
    assert type(model[0]) is nn.BatchNorm2d
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(InputError, match=r"^calibrate is a int: expected batches"):
        convert(model, "group:2", calibrate=3)


def test_a_layer_that_cannot_be_fit_explains_what_it_does():
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False)).double()
    grouped, _ = convert(model, "group:2")
    with torch.no_grad():
        grouped[0].weight.copy_(randn(4, seed=1))
        back, report = convert(grouped, "torch-batch", calibrate=batches())
        x = torch.cat(batches())
        y, found = grouped.eval()(x), back.eval()(x)
    left, total = (y - found).square().sum(), (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert back[0].weight is None
    assert not report.returned  # Its running statistics are those of the batches.
    assert report.explained["0"] == pytest.approx(float(1 - left / total))


def test_a_layer_that_is_called_otherwise_in_the_new_model_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batch_norm()

        def forward(self, x):
            x = self.norm(x)
            return self.norm(x) if isinstance(self.norm, nn.GroupNorm) else x

    with pytest.raises(InputError, match=r"^norm: it was called 1 times in the old model and 2 "):
        convert(Fickle(), "group:2", calibrate=batches())
