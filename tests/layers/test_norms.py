import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normlab.errors import InputError
from normlab.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    RMSNorm,
    norm_constructor,
    norm_names,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CHANNELS = 16


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_names():
    assert norm_names() == ["batch", "torch-batch", "layer", "instance", "rms", "group:8"]


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
@pytest.mark.parametrize("name", norm_names())
def test_every_name_builds_a_layer_that_normalizes_and_learns(name, spatial):
    layer = norm_constructor(name)(CHANNELS, spatial)
    if name == "instance" and spatial == 0:
        assert layer is None
        return
    x = 3 + 5 * randn(6, CHANNELS, *[4] * spatial)
    y = layer.double()(x)
    assert y.shape == x.shape
    assert_close(y.square().mean().item(), 1.0, rtol=1e-3, atol=0)
    y.square().sum().backward()
    assert layer.weight.shape == (CHANNELS,)
    assert (layer.weight.grad != 0).all()


@pytest.mark.parametrize(
    ("name", "spatial", "expected"),
    [
        ("batch", 0, BatchNorm1d),
        ("batch", 1, BatchNorm1d),
        ("batch", 2, BatchNorm2d),
        ("batch", 3, BatchNorm3d),
        ("torch-batch", 0, nn.BatchNorm1d),
        ("torch-batch", 1, nn.BatchNorm1d),
        ("torch-batch", 2, nn.BatchNorm2d),
        ("torch-batch", 3, nn.BatchNorm3d),
        ("instance", 1, nn.InstanceNorm1d),
        ("instance", 2, nn.InstanceNorm2d),
        ("instance", 3, nn.InstanceNorm3d),
        ("rms", 2, RMSNorm),
    ],
)
def test_a_name_stands_for_its_class(name, spatial, expected):
    assert type(norm_constructor(name)(CHANNELS, spatial)) is expected


def test_group_builds_the_number_of_groups_it_names():
    assert norm_constructor("group:4")(CHANNELS, 2).num_groups == 4
    assert norm_constructor("group:4")(4, 2).num_groups == 4  # Positions suffice on an image.


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (5, 6, 3, 4), (5, 6, 2, 3, 4)])
def test_layer_is_torchs_layer_norm_over_all_but_the_batch(shape):
    x = 2 + 3 * randn(*shape)
    layer = norm_constructor("layer")(6, len(shape) - 2).double()
    assert_close(layer(x), F.layer_norm(x, shape[1:], eps=1e-5), **EXACT)


def test_instance_normalizes_each_channel_of_each_image():
    x = 2 + 3 * randn(5, 6, 3, 4)
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    actual = norm_constructor("instance")(6, 2).double()(x)
    assert_close(actual, (x - mean) / (var + 1e-5).sqrt(), **EXACT)


def test_rms_matches_torch_on_features():
    ours, theirs = RMSNorm(6, eps=0.1).double(), nn.RMSNorm(6, eps=0.1).double()
    weight, cotangent = randn(6), randn(5, 6)
    seen = []
    for layer in (ours, theirs):
        layer.load_state_dict({"weight": weight.clone()})
        x = (2 * randn(5, 6)).requires_grad_()
        y = layer(x)
        y.backward(cotangent)
        seen.append([y, x.grad, layer.weight.grad])
    assert_close(*seen, **EXACT)


@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6, 3, 4), (5, 6, 2, 3, 4)])
def test_rms_is_its_formula_on_images(shape):
    layer, x, weight = RMSNorm(6, eps=0.1).double(), 2 + randn(*shape), randn(6)
    layer.load_state_dict({"weight": weight})
    for sample, normalized in zip(x, layer(x), strict=True):
        root = ((sample**2).sum() / sample.numel() + 0.1).sqrt()
        for channel in range(6):
            assert_close(normalized[channel], sample[channel] / root * weight[channel], **EXACT)


def test_rms_resets_and_describes_itself():
    layer = RMSNorm(2, eps=0.1)
    assert repr(layer) == "RMSNorm(2, eps=0.1)"
    nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert_close(layer.weight.data, torch.ones(2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bach", "", "batch:2", "layer:"])
def test_an_unknown_name_is_told_the_known_ones(name):
    known = r"known are batch, torch-batch, layer, instance, rms, group:8$"
    with pytest.raises(InputError, match=f"unknown norm '{name}': {known}"):
        norm_constructor(name)


@pytest.mark.parametrize("name", ["group", "group:", "group:0", "group:two", "group:-2"])
def test_group_wants_its_number(name):
    with pytest.raises(InputError, match=f"'{name}': group norm wants its number of groups"):
        norm_constructor(name)


def test_a_number_of_groups_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="group:3 does not divide a layer of 16 channels"):
        norm_constructor("group:3")(CHANNELS, 2)


def test_a_group_of_one_value_is_refused():
    with pytest.raises(InputError, match="group:16 on a layer of 16 features leaves one value"):
        norm_constructor("group:16")(CHANNELS, 0)
