import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.networks import build_network
from normlab.surgery.certificate import compare
from normlab.surgery.changes import Activated

from .conftest import EXACT, NORMS, assert_folded, image, net, pair, prepared, randn, state

pytestmark = pytest.mark.usefixtures("one_thread")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "padding": 1},
        {"groups": 2, "stride": 2},
        {"groups": 4, "dilation": 2, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_a_convolution_takes_in_the_batch_norm_after_it(rank, kinds, options, affine):
    conv = kinds[rank](4, 8, 3, **options)
    model = nn.Sequential(conv, BATCH_NORMS[rank](8, affine=affine), nn.ReLU())
    result, report = assert_folded(model, image(rank), {"1": ("0", "before")})
    assert isinstance(result[1], nn.Identity)
    assert report.added == (() if options.get("bias", True) else ("0.bias",))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_any_padding_before_a_batch_norm_and_all_but_zeros_after_it(rank, mode):
    def conv(inputs, outputs):
        return CONVOLUTIONS[rank](inputs, outputs, 3, padding=2, padding_mode=mode, groups=2)

    norms = [BATCH_NORMS[rank](channels) for channels in (4, 8)]
    model = nn.Sequential(norms[0], conv(4, 8), norms[1], nn.ReLU())
    assert_folded(model, image(rank), {"0": ("1", "after"), "2": ("1", "before")})


def test_weights_by_hand():
    model = prepared(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, eps=0.25)))
    result, _ = normlab.fold(model, image(2, 2))
    conv, norm = model
    for channel in range(3):
        scale = norm.weight[channel] / math.sqrt(norm.running_var[channel] + 0.25)
        shift = norm.bias[channel] + (conv.bias[channel] - norm.running_mean[channel]) * scale
        assert_close(result[0].weight[channel], conv.weight[channel] * scale, **EXACT)
        assert_close(result[0].bias[channel], shift, **EXACT)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, padding="valid", bias=False),
        nn.Conv2d(4, 6, 1, padding="same"),
        nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False),
    ],
    ids=str,
)
def test_a_layer_takes_in_the_batch_norm_before_it(layer):
    assert_folded(nn.Sequential(nn.BatchNorm2d(4), layer), image(2), {"0": ("1", "after")})


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), "pads with zeros"),
        (nn.Conv2d(4, 6, 3, padding="same"), "pads with zeros"),
        (nn.Conv2d(4, 6, (1, 3), padding="same"), "pads with zeros"),
        (nn.Conv2d(4, 6, 1, padding=(0, 1)), "pads with zeros"),
        (nn.ConvTranspose2d(4, 6, 2), "is transposed"),
        (nn.ConvTranspose2d(4, 6, (1, 2)), "is transposed"),
        (nn.ConvTranspose2d(4, 6, 1, stride=(1, 2)), "is transposed"),
        (nn.ConvTranspose2d(4, 6, 1, padding=1), "is transposed"),
        (nn.ConvTranspose2d(4, 6, 1, dilation=2, output_padding=1), "is transposed"),
    ],
    ids=str,
)
def test_what_a_layer_cannot_take_in_before_it_unless_nothing_is_shifted(layer, why):
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    _, report = assert_folded(model, image(2), {}, ["0"])
    assert f"1, the layer after it, {why}" in report.left["0"]
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias[1:] = 0
    assert_folded(model, image(2), {}, ["0"], prepare=False)
    with torch.no_grad():
        model[0].bias.zero_()
    assert_folded(model, image(2), {"0": ("1", "after")}, prepare=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear_layers(bias, affine):
    norms = [nn.BatchNorm1d(size, affine=affine) for size in (4, 5)]
    model = nn.Sequential(norms[0], nn.Linear(4, 5, bias=bias), norms[1], nn.Sigmoid())
    assert_folded(model, randn(6, 4), {"0": ("1", "after"), "2": ("1", "before")})


class Flat(nn.Module):
    """A linear layer over tokens and a batch norm over their channels, as in LeViT."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def test_a_linear_layer_over_tokens():
    assert_folded(Flat(), randn(2, 3, 4), {"norm": ("linear", "before")})


@pytest.mark.parametrize(
    ("layer", "view", "channels"),
    [
        (nn.Linear(4, 6), lambda y: y.flatten(0, 1)[:, :3], 3),
        (nn.Linear(4, 6), lambda y: y.flatten(0, 1).t(), 6),
        (nn.Conv1d(3, 6, 1), lambda y: y.flatten(0, 1), 4),
    ],
    ids=["some channels", "transposed", "convolution"],
)
def test_channels_that_a_view_made_others(layer, view, channels):
    model = net(
        lambda self, x: self.norm(view(self.layer(x))), layer=layer, norm=nn.BatchNorm1d(channels)
    )
    _, report = assert_folded(model, randn(2, 3, 4), {}, ["norm"])
    assert "the channels of layer, the layer before it, are not its own" in report.left["norm"]


def test_several_batch_norms_in_a_row():
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms[:2], nn.ReLU(), norms[2])
    assert_folded(model, image(2, 3), {"1": ("0", "before"), "2": ("0", "before")}, ["4"])


def test_modules_across_boundaries_and_whatever_code_is_between():
    def forward(self, x):
        for name in ("first", "second"):
            x = getattr(self, name)(x)
        return {"scores": [F.dropout(F.relu(self.norm(x)), training=self.training)]}

    model = net(
        forward,
        first=nn.Sequential(nn.Conv2d(4, 4, 3)),
        second=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)),
        norm=nn.BatchNorm2d(2),
    )
    folded = {"second.0": ("first.0", "before"), "norm": ("second.2", "before")}
    assert_folded(model, image(2), folded)


def test_modules_called_twice_are_folded_where_each_call_is_paired():
    def forward(self, x, y):
        return self.norm(self.conv(x)) - self.norm(self.conv(y))

    model = net(forward, conv=nn.Conv2d(4, 3, 3), norm=nn.BatchNorm2d(3))
    assert_folded(model, (image(2), image(2) + 1), {"norm": ("conv", "before")})


def test_modules_called_by_keyword():
    model = net(
        lambda self, x: self.norm(input=self.conv(input=x)),
        conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
    )
    assert_folded(model, image(2), {"norm": ("conv", "before")})


def test_one_module_under_two_names():
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    result, report = assert_folded(model, image(2), {"1": ("0", "before")})
    assert result[1] is result[4]
    assert "4.weight" in report.removed


def typed_storage(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated, and used.
        return x.storage()


READERS = {
    "is also read by mul": lambda self, x: self.norm(y := self.conv(x)) + 2 * y,
    "is also read by relu_": lambda self, x: self.norm(F.relu_(self.conv(x))),
    "is also read by relu": lambda self, x: self.norm(y := self.conv(x)) + y.view(-1).relu().sum(),
    "is kept, or returned by the model": lambda self, x: (self.norm(y := self.conv(x)), y[:1]),
    "is also read by numpy": lambda self, x: self.norm(y := self.conv(x)) + y.numpy().max(),
    "is also read by tolist": lambda self, x: self.norm(y := self.conv(x)) + y[0, 0, 0].tolist()[0],
    "is also read by __array__": lambda self, x: self.norm(y := self.conv(x)) + np.asarray(y).max(),
    "is also read by __dlpack__": lambda self, x: (
        self.norm(y := self.conv(x)) + np.from_dlpack(y).max()
    ),
    "is also read by data_ptr": lambda self, x: self.norm(y := self.conv(x)) + (y.data_ptr() > 0),
    "is also read by storage": lambda self, x: self.norm(y := self.conv(x)) + typed_storage(y)[0],
    "is also read by untyped_storage": lambda self, x: (
        self.norm(y := self.conv(x)) + len(y.untyped_storage())
    ),
    "is also read by other": lambda self, x: self.norm(y := self.conv(x)) + self.other(y),
    "is not always passed on once": lambda self, x: self.norm(self.conv(x)) + len(self.conv(x + 1)),
    "no convolution or linear layer makes its input": lambda self, x: self.norm(self.conv(x) + 1),
    "its inputs come from several layers": lambda self, x: (
        self.norm(self.conv(x)) + self.norm(self.other(x))
    ),
    "the forward pass goes elsewhere": lambda self, x: F.batch_norm(
        self.conv(x), self.norm.running_mean, self.norm.running_var
    ),
}


@pytest.mark.parametrize("why", READERS)
def test_what_else_is_read_is_seen(why):
    model = net(
        READERS[why], conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), other=nn.Conv2d(4, 4, 3)
    )
    if "other" in why:
        model.other = nn.Conv2d(4, 4, 1)
    model = prepared(model)
    before = state(model)
    _, report = normlab.fold(model, image(2))
    assert state(model) == before
    assert report.certificate is None
    why = "the tensors of it are also read elsewhere" if "elsewhere" in why else why
    assert why in report.left["norm"]


def test_a_layer_that_is_also_called_where_no_memory_is_seen():
    def forward(self, x):
        return self.norm(self.linear(x)) + torch.vmap(self.linear)(x)

    model = net(forward, linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))
    _, report = assert_folded(model, randn(5, 4), {}, ["norm"])
    assert "returns something else than one new tensor" in report.left["norm"]


def test_a_batch_norm_that_is_called_where_no_memory_is_seen():
    model = net(lambda self, x: torch.vmap(self.norm)(x), norm=nn.BatchNorm1d(4))
    _, report = assert_folded(model, randn(2, 3, 4), {}, ["norm"])
    assert "its output is read by nothing" in report.left["norm"]


READERS_AFTER = {
    "its output is read by conv, other, not by one such layer alone": lambda self, x: (
        self.conv(y := self.norm(x)) + self.other(y)
    ),
    "what it returns is kept, or returned by the model": lambda self, x: (
        self.conv(y := self.norm(x)),
        y,
    ),
    "conv is called on more than that": lambda self, x: self.conv(self.norm(x)) + self.conv(x),
    "the channels of conv, the layer after it, are not its own": lambda self, x: self.conv(
        self.norm(x).transpose(1, 2)
    ),
    "its output is read by nothing, not by one such layer alone": lambda self, x: self.norm(x),
}


@pytest.mark.parametrize("why", READERS_AFTER)
def test_what_else_is_read_is_seen_of_a_batch_norm_too(why):
    model = net(
        READERS_AFTER[why],
        norm=nn.BatchNorm2d(4),
        conv=nn.Conv2d(4, 4, 3),
        other=nn.Conv2d(4, 4, 3),
    )
    _, report = normlab.fold(prepared(model), randn(2, 4, 4, 4))
    assert report.left == {"norm": f"no convolution or linear layer makes its input; {why}"}


class Borrowing(nn.Conv2d):
    """Reads a weight of another layer's."""

    def forward(self, x):
        return super().forward(x) * self.lenders[0].weight.sum()


def test_a_layer_that_reads_what_is_anothers_is_seen():
    model = net(
        lambda self, x: self.norm(self.conv(x)) + self.borrowing(x),
        conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
        borrowing=Borrowing(4, 4, 3),
    )
    model.borrowing.lenders = [model.conv]
    _, report = assert_folded(model, image(2), {}, ["norm"])
    why = "the tensors of conv, the layer before it, are also read elsewhere, by sum"
    assert why in report.left["norm"]


class Through(nn.Linear):
    def forward(self, x):
        return x


def test_who_read_a_value_before_a_layer_returned_it_again_is_not_forgotten():
    def forward(self, x):
        y = self.conv(x)
        normed = self.norm(y) + 2 * y
        self.through(y)
        return normed

    layers = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4), "through": Through(1, 1)}
    _, report = assert_folded(net(forward, **layers), image(2), {}, ["norm"])
    assert "is also read by mul" in report.left["norm"]


def test_a_value_in_a_circle_of_garbage_is_kept_by_nobody():
    def forward(self, x):
        circle = [self.conv(x)]
        circle.append(circle)
        return self.norm(circle[0])

    model = net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    assert_folded(model, image(2), {"norm": ("conv", "before")})


def test_a_value_that_is_stored_on_the_way():
    def forward(self, x):
        self.seen = self.conv(x)
        return self.norm(self.seen)

    model = prepared(net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)))
    assert "is kept" in normlab.fold(model, image(2))[1].left["norm"]


def shared(name):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    setattr(model[2], name, getattr(model[0], name))
    return model


def held():
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.register_buffer("buffer", model[0].weight)
    return model


def hooked(index, hook):
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    getattr(model[index], hook)(lambda *_: None)
    return model


def changed(index, function):
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    function(model[index])
    return model


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * F.conv2d(x, self.weight, self.bias)


class Biasless(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).div_(2)


class Activating(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class Observing(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        self.mean = y.mean()
        return y


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).add_(self.bias.sum())


class Weighted(nn.Conv2d):
    def forward(self, x):
        return torch.addcmul(x, self.weight, self.bias)


class Idle(nn.Conv2d):
    def forward(self, x):
        return 2 * x


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Normalizing(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return 2 * super().forward(self.norm(x))


class PaddedInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias)


class PaddedBefore(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Delegating(nn.Conv2d):
    def forward(self, x):
        return convolved(self, x)


def convolved(conv, x):
    return F.conv2d(x, conv.weight, conv.bias)


class Padded(nn.Conv2d):
    """Pads by itself, as TensorFlow's "same" does."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def bounded(module):
    nn.utils.parametrize.register_parametrization(module, "bias", nn.Tanh())


PARAMETRIZED = nn.utils.parametrizations.weight_norm


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (shared("weight"), "the weight of 0, the layer before it, is shared: 0.weight, 2.weight"),
        (shared("bias"), "the bias of 0, the layer before it, is shared: 0.bias, 2.bias"),
        (held(), "the weight of 0, the layer before it, is shared: buffer, 0.weight"),
        *[
            (hooked(i, f"register_{each}"), f"{what} has hooks")
            for i, what in ((0, "0, the layer before it,"), (1, "it"))
            for each in (
                *("forward_hook", "forward_pre_hook"),
                *("full_backward_hook", "full_backward_pre_hook"),
            )
        ],
        (changed(0, PARAMETRIZED), "the weight of 0, the layer before it, is computed"),
        (changed(1, lambda m: PARAMETRIZED(m, dim=None)), "the weight of it is computed"),
        (changed(1, bounded), "the bias of it is computed"),
        (changed(1, lambda m: setattr(m, "forward", m.forward)), "the forward of it was set"),
        (changed(0, lambda m: setattr(m, "forward", m.forward)), "the forward of 0, the layer"),
        (changed(1, lambda m: m.train()), "it is in training mode by choice"),
        (pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "it has no runn"),
        (pair(nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d()), "it is not initialized"),
        (pair(nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d(affine=False)), "it is not initialized"),
        (pair(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), "0, the layer before it, is not init"),
        (pair(Standardized(4, 4, 1), nn.BatchNorm2d(4)), "with its own weight alone: mean, sub"),
        (pair(Doubled(4, 4, 1), nn.BatchNorm2d(4)), "with its own weight alone: convolution"),
        (pair(nn.Conv2d(4, 4, 1), DoubledNorm(4)), "the forward of its class DoubledNorm does"),
        (pair(Shifted(4, 4, 1), nn.BatchNorm2d(4)), "its own weight alone: convolution, sum read"),
        (pair(Weighted(4, 1, 1), nn.BatchNorm2d(4)), "its own weight alone: addcmul read"),
        (pair(Idle(4, 4, 1), nn.BatchNorm2d(4)), "its own weight alone: nothing read"),
        (pair(Biasless(4, 4, 1), nn.BatchNorm2d(4)), "its own weight alone: convolution read"),
        (pair(Biasless(4, 4, 1, bias=False), nn.BatchNorm2d(4)), "its own, which reads no bias"),
        (pair(Delegating(4, 4, 1, bias=False), nn.BatchNorm2d(4)), "its own, which reads no bias"),
        (pair(Halved(4, 4, 1), nn.BatchNorm2d(4)), "more than convolve: div_ reads what it makes"),
        (pair(Activating(4, 4, 1), nn.BatchNorm2d(4)), "more than convolve: act reads what it mak"),
        (pair(Observing(4, 4, 1), nn.BatchNorm2d(4)), "more than convolve: mean reads what it mak"),
        (pair(DoubledLinear(6, 7), nn.BatchNorm2d(4)), "before it, has a forward of its own"),
        (Normalizing().eval(), "the model, the layer after it, is no convolution with its own"),
        (pair(nn.BatchNorm2d(4), Padded(4, 4, 2)), "1, the layer after it, has a forward of its"),
        (
            pair(nn.BatchNorm2d(4), PaddedInside(4, 4, 2)),
            "the layer after it, has a forward of its",
        ),
        (nn.BatchNorm2d(4).eval(), "no convolution or linear layer makes its input"),
    ],
    ids=str,
)
def test_what_is_left_is_named_with_the_reason(model, why):
    _, report = normlab.fold(model.double(), image(2))
    assert not report.folded
    (reason,) = report.left.values()
    assert why in reason
    assert why in str(report)


def test_hooks_that_read_what_passes_are_seen():
    model = prepared(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda *_: None)
    assert "is also read by hooks of 0" in normlab.fold(model, image(2))[1].left["1"]


@pytest.mark.parametrize(
    "conv", [Padded(4, 6, 2, bias=False), PaddedBefore(4, 6, 2, bias=False), Delegating(4, 6, 2)]
)
def test_a_convolution_of_its_own_that_is_one_with_its_weight(conv):
    model = nn.Sequential(conv, nn.BatchNorm2d(6))
    assert_folded(model, image(2), {"1": ("0", "before")})


def test_channels_that_are_not_the_second_dimension():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    _, report = assert_folded(model, randn(2, 3, 4), {}, ["1"])
    assert "the channels of 0, the layer before it, are not its own" in report.left["1"]
    unbatched = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm1d(5))
    assert_folded(unbatched, randn(4, 7, 6), {}, ["1"])
    after = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    _, report = assert_folded(after, randn(2, 4, 4), {}, ["0"])
    assert "the channels of 1, the layer after it, are not its own" in report.left["0"]


class NormAct(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return self.act(self.drop(x))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.PReLU(), nn.Identity()], ids=str)
def test_what_a_subclass_hands_on_to_stays(act):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), NormAct(4, act))
    result, _ = assert_folded(model, image(2), {"1": ("0", "before")})
    assert type(result[1].act) is type(act)
    assert isinstance(result[1].drop, nn.Identity)


ANOTHER = randn(2, 4, 4, 4, seed=1)


def normalized(norm, x):
    return nn.BatchNorm2d.forward(norm, x)


@pytest.mark.parametrize(
    ("affine", "forward"),
    [
        (True, lambda self, x: normalized(self, x).relu_()),
        (False, lambda self, x: torch.addcdiv(x, self.running_mean, self.running_var)),
        (True, lambda self, _: normalized(self, ANOTHER)),
        (True, lambda self, x: F.batch_norm(x, self.running_mean, self.running_var)),
        (True, lambda self, x: (self.drop(x), self.act(normalized(self, x)))[1]),
        (True, lambda self, x: (y := normalized(self, x), self.act(y))[0]),
    ],
    ids=["in place", "another step", "another value", "bare", "a part beside", "a part unused"],
)
def test_a_subclass_that_does_anything_else_is_left(affine, forward):
    norm = type("Own", (NormAct,), {"forward": forward})(4, nn.ReLU())
    if not affine:
        norm.weight = norm.bias = None
    _, report = assert_folded(nn.Sequential(nn.Conv2d(4, 4, 1), norm), randn(2, 4, 4, 4), {}, ["1"])
    assert report.left["1"] == (
        "the forward of its class Own does more than normalize and hand on to its parts"
    )


def test_a_subclass_that_gets_more_is_left():
    own = type("Own", (NormAct,), {"forward": lambda self, x, _: NormAct.forward(self, x)})
    model = net(residual_by_position, conv=nn.Conv2d(4, 4, 1), norm=own(4, nn.ReLU()))
    assert_folded(model, image(2), {}, ["norm"])


def test_a_subclass_that_does_not_always_do_the_same_is_left():
    class Wide(NormAct):
        def forward(self, x):
            return self.act(normalized(self, x)) if x.shape[-1] > 4 else normalized(self, x)

    def forward(self, x):
        return self.norm(self.conv(x)).sum() + self.norm(self.conv(x[..., :3]))

    model = net(forward, conv=nn.Conv2d(4, 4, 1), norm=Wide(4, nn.ReLU()))
    _, report = assert_folded(model, image(2), {}, ["norm"])
    assert report.left["norm"] == "the forward of its class Wide varies"


@pytest.mark.parametrize(
    "norm",
    [NormAct(4, nn.ReLU()), normlab.BatchNorm2d(4, activation="relu")],
    ids=["part", "activation"],
)
def test_nothing_is_folded_past_an_activation(norm):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.BatchNorm2d(4))
    _, report = assert_folded(model, image(2), {"1": ("0", "before")}, ["2"])
    assert report.left["2"].startswith("no convolution or linear layer makes its input")
    _, report = assert_folded(nn.Sequential(norm, nn.Conv2d(4, 4, 1)), image(2), {}, ["0"])
    assert report.left["0"] == (
        "no convolution or linear layer makes its input; it does more than the layer after it could"
    )


def test_past_a_subclass_whose_parts_do_nothing_batch_norms_are_folded():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), NormAct(4, nn.Identity()), nn.BatchNorm2d(4))
    assert_folded(model, image(2), {"1": ("0", "before"), "2": ("0", "before")})


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, normlab.SyncBatchNorm, normlab.BatchNorm2d])
def test_kinds_of_batch_norms(norm):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), norm(4))
    folded = {"1": ("0", "before"), "2": ("0", "before")}
    result, _ = assert_folded(model, image(2), folded)
    assert type(result[1]) is nn.Identity
    assert_folded(nn.Sequential(norm(4), nn.Conv2d(4, 4, 3)), image(2), {"0": ("1", "after")})


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (None, nn.Identity),
        ("relu", nn.ReLU),
        ("leaky_relu", nn.LeakyReLU),
        ("sigmoid", nn.Sigmoid),
        ("silu", nn.SiLU),
    ],
)
def test_activations_of_normlabs_layers_stay(activation, kind):
    norm = normlab.BatchNorm2d(4, activation=activation, negative_slope=0.3)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm)
    result, _ = assert_folded(model, image(2), {"1": ("0", "before")})
    assert type(result[1]) is kind
    assert getattr(result[1], "negative_slope", 0.3) == 0.3


def residual(self, x):
    return self.norm(self.conv(x), residual=x)


def residual_by_position(self, x):
    return self.norm(self.conv(x), x)


@pytest.mark.parametrize("forward", [residual, residual_by_position])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_residuals_of_normlabs_layers_stay(activation, forward):
    norm = normlab.BatchNorm2d(4, activation=activation)
    model = net(forward, conv=nn.Conv2d(4, 4, 1), norm=norm)
    result, _ = assert_folded(model, image(2), {"norm": ("conv", "before")})
    assert type(result.norm) is Activated
    assert [each.training for each in result.modules()] == [False] * 4


def test_residuals_in_some_calls_only():
    def forward(self, x):
        return self.norm(self.conv(x), x) + self.norm(self.conv(2 * x))

    model = net(forward, conv=nn.Conv2d(4, 4, 1), norm=normlab.BatchNorm2d(4))
    assert_folded(model, image(2), {"norm": ("conv", "before")})


def test_nothing_is_folded_past_a_residual():
    model = net(
        lambda self, x: self.last(residual(self, x)),
        conv=nn.Conv2d(4, 4, 1),
        norm=normlab.BatchNorm2d(4),
        last=nn.BatchNorm2d(4),
    )
    assert_folded(model, image(2), {"norm": ("conv", "before")}, ["last"])


def test_the_order_is_that_of_the_calls():
    def forward(self, x):
        return sum(self.second(self.first(self.conv(each))) for each in (x, 2 * x))

    norms = {"second": nn.BatchNorm2d(4), "first": nn.BatchNorm2d(4)}
    model = net(forward, **norms, conv=nn.Conv2d(4, 4, 3))
    folded = {"first": ("conv", "before"), "second": ("conv", "before")}
    _, report = assert_folded(model, image(2), folded)
    assert list(report.folded) == ["first", "second"]


def test_a_residual_that_is_the_input_too():
    model = net(
        lambda self, x: self.norm(y := self.conv(x), y),
        conv=nn.Conv2d(4, 4, 1),
        norm=normlab.BatchNorm2d(4),
    )
    assert_folded(model, image(2), {}, ["norm"])


def test_a_mask_is_no_residual():
    mask = torch.ones(2, 7, 6, dtype=torch.bool)
    model = net(
        lambda self, x: self.norm(self.conv(x), mask=mask),
        conv=nn.Conv2d(4, 4, 1),
        norm=normlab.BatchNorm2d(4),
    )
    _, report = assert_folded(model, image(2), {}, ["norm"])
    assert "something else than a tensor and a residual" in report.left["norm"]


@pytest.mark.parametrize("network", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arm", ["batch", "torch-batch"])
def test_bundled_networks(network, arm):
    model = build_network(network, arm, 0, image_shape=(3, 32, 32), classes=10)
    norms = [name for name, each in model.named_modules() if isinstance(each, NORMS)]
    x = randn(2, 3, 32, 32)
    _, report = normlab.fold(prepared(model), x)
    assert list(report.folded) == norms
    assert report.certificate.relative_largest < 1e-12


class Dense(nn.Module):
    """A layer of a DenseNet: what it makes is joined to what it got."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class PreActivation(Dense):
    def forward(self, x):
        y = F.relu(self.norm1(x))
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


@pytest.mark.parametrize("block", [Dense, PreActivation])
def test_blocks_that_normalize_first(block):
    _, report = assert_folded(block(), image(2), {"norm2": ("conv1", "before")}, ["norm1"])
    assert report.left["norm1"].endswith("its output is read by relu, not by one such layer alone")


def test_a_converted_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(y)) + x)

    model, _ = normlab.convert(prepared(Block()))
    assert model.bn2.activation == "relu"
    result, _ = normlab.fold(model, image(2))
    assert type(result.bn1) is nn.ReLU
    assert type(result.bn2) is Activated
    assert_close(result(image(2)), model(image(2)), **EXACT)


def test_a_graph_module():
    traced = fx.symbolic_trace(prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    result, report = normlab.fold(traced, image(2))
    assert report.folded
    assert_close(result(image(2)), traced(image(2)), **EXACT)


# What torch's own folding does wrong, and that it does.


def torchs(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Importing it warns of what it imports.
        from torch.fx.experimental.optimization import fuse
    return fuse(model)


def test_torchs_folding_of_linear_layers_takes_no_batch_norm_without_weights():
    model = prepared(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False)))
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(*model)
    assert_folded(model, randn(5, 4), {"1": ("0", "before")})


def test_torchs_folding_of_grouped_transposed_convolutions_fails():
    model = prepared(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    with pytest.raises(RuntimeError):
        fuse_conv_bn_eval(*model, transpose=True)
    assert_folded(model, image(2), {"1": ("0", "before")})


def test_torchs_folding_spoils_shared_convolutions():
    conv = nn.Conv2d(4, 4, 3)
    model = prepared(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4)))
    assert (torchs(model)(image(2)) - model(image(2))).abs().max() > 0.1
    assert_folded(model, image(2), {}, ["1", "4"])


def test_torchs_folding_takes_tokens_for_channels():
    model = prepared(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    x = randn(2, 3, 4)
    assert (torchs(model)(x) - model(x)).abs().max() > 0.1
    assert_folded(model, x, {}, ["1"])


# What is kept.


def test_modes_randomness_and_what_is_frozen():
    layers = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(), nn.Dropout()
    model = prepared(nn.Sequential(*layers))
    model[0].weight.requires_grad_(False)
    model.train()
    model[2].eval()
    model[1].register_buffer("mine", torch.ones(1))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    result, report = normlab.fold(model, image(2))
    assert [each.training for each in result.modules()] == [True, True, True, False, True]
    assert report.training
    assert "training mode" in str(report)
    assert not result[0].weight.requires_grad
    assert result[0].bias.requires_grad  # That of the batch norm's.
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_is_as_frozen_as_the_weight_where_the_batch_norm_has_none(trained):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    model[0].weight.requires_grad_(trained)
    result, _ = assert_folded(model, randn(5, 4), {"1": ("0", "before")})
    assert result[0].bias.requires_grad is trained


def test_a_bias_stays_as_frozen_as_it_was():
    model = prepared(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    model[0].bias.requires_grad_(False)
    result, _ = normlab.fold(model, randn(5, 4))
    assert (result[0].weight.requires_grad, result[0].bias.requires_grad) == (True, False)


def test_modes_in_evaluation_are_those_that_the_model_has():
    def forward(self, x):
        return x if self.training else self.norm(x)

    model = prepared(nn.Sequential(nn.Linear(4, 3), net(forward, norm=nn.BatchNorm1d(3))))
    model[1].training = True
    _, report = normlab.fold(model, randn(5, 4))
    assert report.left == {"1.norm": "it is not called on the example"}


def test_a_model_that_draws_at_random_or_counts_is_compared_with_itself():
    def forward(self, x):
        self.calls += 1  # Without gradients a parameter may be changed in place.
        return F.dropout(self.norm(self.conv(x))) * (1 + torch.rand(1)) * self.calls

    model = net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    model.calls = nn.Parameter(torch.zeros(()))
    result, report = normlab.fold(prepared(model), image(2))
    assert report.certificate.relative_largest < 1e-12
    assert result.calls == model.calls


def test_in_place():
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)))
    expected = model(image(2))
    norm = model[1]
    removed = tuple(key for key in model.state_dict() if key.startswith("1."))
    result, report = normlab.fold(model, image(2), inplace=True)
    assert (report.removed, report.added) == (removed, ("0.bias",))
    assert result is model
    assert model[1] is norm
    assert type(norm) is nn.Identity
    assert_close(model(image(2)), expected, **EXACT)


def test_who_holds_a_batch_norm_elsewhere_holds_what_is_left_of_it():
    model = net(
        lambda self, x: self.norms[0](self.conv(x)),
        conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
    )
    model.norms = [model.norm]
    assert_folded(model, image(2), {"norm": ("conv", "before")})


def test_layouts_and_dtypes():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = prepared(model, torch.bfloat16).to(memory_format=torch.channels_last)
    result, report = normlab.fold(model, image(2).bfloat16())
    assert result[0].weight.dtype == result[0].bias.dtype == torch.bfloat16
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert report.certificate.tolerance == 2e-2


def test_the_tolerance_is_that_of_parameters_whose_output_is_more_precise():
    model = net(lambda self, x: self.m(x).double(), m=pair(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert normlab.fold(model.eval(), torch.ones(2, 4))[1].certificate.tolerance == 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)],
)
def test_the_tolerance_is_that_of_the_least_precise(dtype, tolerance):
    model = nn.Sequential(nn.Linear(2, 2).to(dtype))
    y = torch.ones(2, dtype=torch.float64)
    assert compare([y], [y], None, model).tolerance == tolerance
    assert compare([y.to(dtype)], [y], None, model.double()).tolerance == tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.cdouble, 1e-9), (torch.cfloat, 1e-4)])
def test_the_tolerance_of_complex_numbers_is_that_of_their_parts(dtype, tolerance):
    y = torch.ones(2, dtype=dtype)
    assert compare([y], [y], None, nn.Identity()).tolerance == tolerance


def test_errors_are_absolute_and_relative_to_the_largest_absolute_value():
    found = compare([torch.tensor([-4.0, 1.0])], [torch.tensor([-5.0, 1.0])], None, nn.Identity())
    assert (found.largest, found.mean, found.scale) == (1, 0.5, 4)
    assert (found.relative_largest, found.relative_mean) == (0.25, 0.125)


@pytest.mark.parametrize(("other", "relative"), [(0.0, 0.0), (1e-30, math.inf)])
def test_an_error_relative_to_zero(other, relative):
    found = compare([torch.zeros(1)], [torch.full((1,), other)], None, nn.Identity())
    assert found.relative_largest == relative


def test_what_is_not_finite_where_the_original_is_is_an_infinite_error():
    y = torch.ones(2)
    for value in (math.nan, math.inf):
        found = compare([y], [torch.tensor([1.0, value])], None, nn.Identity())
        assert found.largest == found.relative_largest == math.inf
    kept = torch.tensor([1.0, math.inf])
    assert compare([kept], [kept], None, nn.Identity()).largest == 0
    assert compare([kept], [-kept], None, nn.Identity()).largest == math.inf


@pytest.mark.parametrize(
    "example", [torch.zeros(0, 4).double(), torch.full((2, 4), math.nan).double()]
)
def test_an_output_without_finite_values_measures_nothing_and_is_refused(example):
    model = prepared(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    before = state(model)
    with pytest.raises(InputError, match="no finite value to measure the error on"):
        normlab.fold(model, example, inplace=True)
    assert state(model) == before


def test_examples_by_position_and_keyword_and_left_alone():
    def forward(self, x, *, scale):
        return self.norm(self.conv(x.mul_(scale)))

    model = prepared(net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)))
    example = {"x": image(2), "scale": 2}
    assert normlab.fold(model, example)[1].folded
    assert_close(example["x"], image(2), rtol=0, atol=0)


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor
    names: str = "none"


def test_certificate_over_nested_outputs():
    def forward(self, x):
        y = self.norm(self.conv(x))
        return Scores(y), {"more": (y.new_full((2,), math.nan), torch.view_as_complex(y[..., :2]))}

    model = net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    model = prepared(model, torch.float32)
    x = image(2).float()
    result, report = normlab.fold(model, x)
    (one, more), (other, again) = model(x), result(x)
    largest = (one.scores.double() - other.scores.double()).abs().max()
    pairs = [(one.scores, other.scores), (one.scores[..., :2], other.scores[..., :2])]
    total = sum((a.double() - b.double()).abs().sum() for a, b in pairs)
    assert report.certificate.largest == largest.item()
    assert report.certificate.scale == one.scores.abs().max().item()
    count = sum(a.numel() for a, _ in pairs) + 2
    assert report.certificate.mean == pytest.approx(total.item() / count)
    assert report.certificate.relative_largest == largest.item() / report.certificate.scale
    assert len(more) == len(again)


def test_an_output_that_is_written_where_the_last_one_was():
    out = torch.empty(2, 4, 5, 4)
    model = net(
        lambda self, x: out.copy_(self.norm(self.conv(x))),
        conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
    )
    _, report = normlab.fold(prepared(model, torch.float32), image(2).float())
    assert report.certificate.largest > 0


# What is refused.


def extreme():
    layers = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = prepared(nn.Sequential(*layers), torch.float32)
    with torch.no_grad():
        model[0].bias.fill_(1000)
        model[1].running_mean.fill_(1000)
        model[1].running_var.copy_(torch.tensor([1e-12, 1, 2, 3]))
        model[1].weight.copy_(torch.tensor([-3, 1, 1, 1]))
    return model


@pytest.mark.parametrize("inplace", [True, False])
def test_above_the_tolerance_nothing_is_changed(inplace):
    model = extreme()
    before = state(model)
    # 3 / sqrt(1e-12 + 1e-5) = 949.
    worst = r"the largest factor, 9.5e\+02, is of 1 \(least running_var 1e-12\)"
    with pytest.raises(InputError, match=f"by more than is allowed .*{worst}"):
        normlab.fold(model, image(2).float(), tolerance=1e-9, inplace=inplace)
    assert state(model) == before


def test_the_tolerance_is_for_the_largest_relative_error_and_may_be_met_just_so():
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.float32)
    x = 1000 * image(2).float()
    _, report = normlab.fold(model, x)
    largest = report.certificate.relative_largest
    assert 0 < largest < report.certificate.tolerance
    assert normlab.fold(model, x, tolerance=largest)[1].folded
    with pytest.raises(InputError, match="by more than is allowed"):
        normlab.fold(model, x, tolerance=math.nextafter(largest, 0))


def test_what_is_exact_is_within_a_tolerance_of_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, eps=0)).eval()
    certificate = normlab.fold(model, torch.ones(1, 2), tolerance=0)[1].certificate
    assert (certificate.largest, certificate.tolerance) == (0, 0)


def test_weights_that_do_not_fit_stay():
    model = prepared(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0)), torch.float16)
    with torch.no_grad():
        model[0].weight.fill_(300)
        model[1].running_var.fill_(6e-8)
    _, report = normlab.fold(model, randn(3, 4).half())
    assert "would have weights of" in report.left["1"]
    model[0].weight.data.fill_(math.nan)
    _, report = normlab.fold(model, randn(3, 4).half())
    assert "would have weights of nan" in report.left["1"]
    model[1].running_var.zero_()
    _, report = normlab.fold(model, randn(3, 4).half())
    assert report.left["1"].startswith("its scale or shift is not finite")
    model[1].running_var.fill_(1)
    model[1].running_mean.fill_(math.inf)
    _, report = normlab.fold(model, randn(3, 4).half())
    assert report.left["1"].startswith("its scale or shift is not finite")


def test_a_bias_that_does_not_fit_stays_although_the_weights_would():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0)).eval().half()
    with torch.no_grad():
        model[0].weight.fill_(1000)
        model[1].running_mean.fill_(64000)
        model[1].running_var.fill_(0.25)
    _, report = normlab.fold(model, torch.full((1, 1), 64).half())
    assert "would have weights of 1.3e+05: torch.float16" in report.left["1"]


def test_a_layer_without_inputs():
    linear = nn.Linear(1, 3)
    linear.in_features, linear.weight = 0, nn.Parameter(torch.empty(3, 0))
    assert_folded(nn.Sequential(linear, nn.BatchNorm1d(3)), randn(2, 0), {"1": ("0", "before")})


def fittable():
    return pair(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Curious(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.eps


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("not this one")


class Derived(nn.Linear):
    """Holds a tensor with a history, as `torch.nn.utils.weight_norm` does."""

    def __init__(self):
        super().__init__(1, 1)
        self.derived = 2 * self.weight


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Conv2d(4, 4, 3), torch.ones(2, 3, 7, 7), "cannot be run on the example .*2, 3, 7, 7"),
        (nn.Conv2d(4, 4, 3), (), "cannot be run on the example .without tensors.: TypeError"),
        (nn.Conv2d(4, 4, 3), "text", "the example is a str: expected a tensor, a tuple"),
        (nn.Conv2d(4, 4, 3), [torch.ones(1)], "the example is a list"),
        ("text", torch.ones(1), "^expected a torch.nn.Module, got str$"),
        (Curious(), torch.ones(2, 4, 7, 7), "folded it does not, .*has no attribute 'eps'"),
        (Uncopyable(), torch.ones(1), "Uncopyable cannot be copied, .*TypeError: not this one"),
        (
            Derived(),
            torch.ones(1),
            "Derived cannot be copied, .*RuntimeError: Only Tensors created",
        ),
        (
            net(lambda self, x: self.m(x).argmax(1), m=fittable()),
            torch.ones(2, 4),
            "the model returns a Tensor of torch.int64: expected floating-point",
        ),
        (
            net(lambda self, x: repr(self.m(x)), m=fittable()),
            torch.ones(2, 4),
            "the model returns a str without tensors: expected floating-point",
        ),
        (
            net(lambda self, x: [self.m(x)] * (1 + hasattr(self.m[1], "eps")), m=fittable()),
            torch.ones(2, 4),
            "the model's output has another structure or shape after the change",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(model, example, message):
    with pytest.raises(InputError, match=message):
        normlab.fold(model.eval() if isinstance(model, nn.Module) else model, example)


@pytest.mark.parametrize("tolerance", [-1, math.nan])
def test_what_is_no_tolerance(tolerance):
    with pytest.raises(InputError, match=f"expected a tolerance of 0 or more, got {tolerance}"):
        normlab.fold(nn.Identity(), torch.ones(1), tolerance=tolerance)


def test_nothing_to_fold():
    result, report = normlab.fold(nn.Linear(2, 2), torch.ones(1, 2))
    assert str(report) == "the model has no batch norms: nothing to fold"
    assert isinstance(result, nn.Linear)


def test_report_reads_well():
    last = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
    model = prepared(
        nn.Sequential(Dense(), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), *last)
    )
    _, report = normlab.fold(model, image(2))
    lines = str(report).splitlines()
    assert lines[0] == "3 batch norms folded, 1 left as they were"
    assert lines[1].startswith("  largest error ")
    assert lines[2:] == [
        "  0.norm2: into 0.conv1, before it",
        "  2: into 1, before it",
        "  4: into 5, after it",
        "  0.norm1: left, no convolution or linear layer makes its input; its output is read by "
        "relu, not by one such layer alone",
        "  state dict: 15 keys gone (.removed), 1 new (.added)",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.folded = {}


def test_report_where_nothing_is_folded():
    _, report = normlab.fold(nn.BatchNorm2d(4), image(2).float())
    assert str(report).splitlines() == [
        "0 batch norms folded, 1 left as they were",
        "  the model: left, no convolution or linear layer makes its input; its output is read by "
        "nothing, not by one such layer alone",
    ]


def test_onnxruntime_runs_what_is_folded(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = prepared(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, bias=False),
            normlab.BatchNorm2d(8, activation="silu"),
            nn.ConvTranspose2d(8, 4, 2, groups=2),
            nn.BatchNorm2d(4),
        ),
        torch.float32,
    )
    x = image(2).float()
    folded, report = normlab.fold(model, x)
    assert len(report.folded) == 2
    path = str(tmp_path / "folded.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter's own.
        torch.onnx.export(folded, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), folded(x).detach(), rtol=1e-5, atol=1e-5)
