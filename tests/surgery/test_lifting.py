"""Functional calls, which become modules before they are folded."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import normlab
from normlab.errors import InputError

from .conftest import EXACT, assert_folded, image, net, prepared, randn

pytestmark = pytest.mark.usefixtures("one_thread")


class Functional(nn.Module):
    """Owns the tensors of a layer and a batch norm, and a way to call them."""

    def __init__(self, call, **modules):
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)
        self.w = nn.Parameter(torch.empty(6, 2, 3, 3))
        self.b = nn.Parameter(torch.empty(6))
        self.gamma, self.beta = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))
        self.register_buffer("mean", torch.empty(6))
        self.register_buffer("running_var", torch.empty(6))

    def _norm(self, x):
        return F.batch_norm(
            x, self.mean, self.running_var, self.gamma, self.beta, self.training, eps=0.1
        )

    def forward(self, x):
        return self.call(self, x).relu()


def whole(self, x):
    return self._norm(F.conv2d(x, self.w, self.b, groups=2, stride=2))


def test_functional_layers_and_batch_norms():
    model = nn.Sequential(Functional(whole), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3))
    folded = {"0.batch_norm0": ("0.layer0", "before"), "2": ("1", "before")}
    result, report = assert_folded(model, image(2), folded)
    assert {"0.w", "0.b", "0.gamma", "0.beta", "0.mean", "0.running_var"} < set(report.removed)
    assert report.added == ("0.layer0.weight", "0.layer0.bias")
    assert result[0].layer0.groups == 2
    assert result[0].layer0.weight.shape == (6, 2, 3, 3)
    assert isinstance(result[0], Functional)
    again = pickle.loads(pickle.dumps(result))
    assert_close(again(image(2)), result(image(2)), rtol=0, atol=0)


def test_a_functional_batch_norm_after_a_module_in_place():
    model = prepared(Functional(lambda self, x: self._norm(self.conv(x)), conv=nn.Conv2d(4, 6, 3)))
    expected = model(image(2))
    result, report = normlab.fold(model.train(), image(2), inplace=True)
    assert result is model
    assert report.folded == {"batch_norm0": ("conv", "before")}
    assert result.training
    assert_close(result.eval()(image(2)), expected, **EXACT)


def tokens(self, x):
    return self._norm(F.linear(x, self.v))


def transposed(self, x):
    return self._norm(F.conv_transpose1d(x, self.v, None, 2, 1, 1, 2, 1))


def volume(self, x):
    return self._norm(F.conv3d(x, self.v, None, 1, 1, 1, 2))


def by_name(self, x):
    return self._norm(F.conv2d(input=x, weight=self.v, groups=2, padding=1))


@pytest.mark.parametrize(
    ("call", "shape", "x"),
    [
        (tokens, (6, 4), randn(5, 4)),
        (transposed, (4, 3, 3), image(1)),
        (volume, (6, 2, 3, 2, 2), image(3)),
        (by_name, (6, 2, 3, 3), image(2)),
    ],
    ids=["linear", "transposed", "volume", "by name"],
)
def test_functional_layers_of_other_kinds(call, shape, x):
    model = Functional(call)
    model.v = nn.Parameter(torch.empty(shape))
    result, _ = assert_folded(model, x, {"batch_norm0": ("layer0", "before")})
    assert result.layer0.weight.shape == shape
    assert ("(4, 6" in repr(result.layer0)) or "in_features=4, out_features=6" in repr(
        result.layer0
    )


def test_modules_get_names_that_are_free():
    model = Functional(whole, layer0=nn.Identity(), batch_norm0=nn.Identity())
    assert_folded(model, image(2), {"batch_norm0_": ("layer0_", "before")})


FUNCTIONAL = {
    "b is also read elsewhere": lambda self, x: whole(self, x) + self.b.sum(),
    "its input is also read elsewhere": lambda self, x: self._norm(y := self.conv(x)) + y,
    "no convolution or linear layer makes its input": lambda self, x: self._norm(self.conv(x) + 1),
    "the forward of Functional cannot be traced": lambda self, x: (
        whole(self, x) if x.sum() > 0 else whole(self, -x)
    ),
    "the forward of Functional depends on the mode": lambda self, x: (
        whole(self, x) + 1 if self.training else whole(self, x)
    ),
    "keeper, the layer before it, returns is kept": lambda self, x: self._norm(self.keeper(x)),
}


class Keeper(nn.Conv2d):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


@pytest.mark.parametrize("why", FUNCTIONAL)
def test_functional_calls_that_stay_are_named(why):
    model = Functional(FUNCTIONAL[why], conv=nn.Conv2d(4, 6, 3), keeper=Keeper(4, 6, 3))
    assert_functional_left(model, why)


def assert_functional_left(model, why):
    result, report = normlab.fold(prepared(model), image(2))
    assert type(result) is type(model)
    assert not report.folded
    assert list(report.left) == ["F.batch_norm in the model"]
    assert why in report.left["F.batch_norm in the model"]


def normalized_with(self, x, *tensors):
    return F.batch_norm(self.conv(x), self.mean, self.running_var, *tensors)


@pytest.mark.parametrize(
    ("why", "call"),
    [
        (
            "the forward of Functional depends on the mode",
            lambda self, x: self.conv(x) if self.training else self._norm(self.conv(x)),
        ),
        (
            "it normalizes by the batch in evaluation too",
            lambda self, x: normalized_with(self, x, self.gamma, self.beta, True),
        ),
        (
            "it reads one tensor twice",
            lambda self, x: normalized_with(self, x, self.gamma, self.gamma),
        ),
        ("its weight is no parameter", lambda self, x: normalized_with(self, x, self.other_mean)),
        (
            "its tensors are computed, or belong to another module",
            lambda self, x: normalized_with(self, x, 2 * self.gamma),
        ),
        (
            "its tensors are computed, or belong to another module",
            lambda self, x: normalized_with(self, x, self.conv.bias),
        ),
        (
            "the weight or bias of the layer before it is no parameter",
            lambda self, x: self._norm(F.conv2d(x, self.w, self.other_mean, groups=2)),
        ),
        (
            "the weight or bias of the layer before it is no parameter",
            lambda self, x: self._norm(F.conv2d(x, self.kernel, self.b, groups=2)),
        ),
        (
            "no convolution or linear layer makes its input",
            lambda self, x: self._norm(self.identity(self.conv(x))),
        ),
        (
            "its input is also read elsewhere",
            lambda self, x: F.batch_norm(
                self.pointwise(self._norm(y := self.conv(x)) + y),
                self.other_mean,
                self.other_running_var,
            ),
        ),
        (
            "its input is also read elsewhere",
            lambda self, x: F.batch_norm(
                self._norm(y := self.conv(x)) + y, self.other_mean, self.other_running_var
            ),
        ),
    ],
)
def test_functional_calls_that_cannot_be_modules_are_named(why, call):
    modules = {"conv": nn.Conv2d(4, 6, 3), "identity": nn.Identity()}
    model = with_other_statistics(call, **modules, pointwise=nn.Conv2d(6, 6, 1))
    model.register_buffer("kernel", torch.empty(6, 2, 3, 3))
    assert_functional_left(model, why)


@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: torch.batch_norm(
            x, None, None, self.mean, self.running_var, False, 0.1, 1e-5, False
        ),
        lambda self, x: torch.batch_norm(
            *(x, None, None),
            running_mean=self.mean,
            running_var=self.running_var,
            training=False,
            momentum=0.1,
            eps=1e-5,
            cudnn_enabled=False,
        ),
    ],
    ids=["by position", "by name"],
)
def test_what_torch_calls_a_batch_norm_is_named(call):
    model = Functional(lambda self, x: call(self, self.conv(x)), conv=nn.Conv2d(4, 6, 3))
    assert_functional_left(model, "it is not a module")


def test_a_functional_batch_norm_whose_weight_a_public_method_reads_stays():
    public = type("Public", (Functional,), {"scale": property(lambda self: self.gamma)})
    assert_functional_left(public(whole), "gamma is also read elsewhere")


def test_of_several_functional_batch_norms_those_that_can_are_folded():
    def call(self, x):
        y = self._norm(self.conv(x))
        return F.batch_norm(y.relu(), self.other_mean, self.other_running_var)

    model = with_other_statistics(call, conv=nn.Conv2d(4, 6, 3))
    result, report = normlab.fold(model, image(2))
    assert report.folded == {"batch_norm0": ("conv", "before")}
    assert report.left == {
        "F.batch_norm in the model": "it is not a module, and cannot become one: no convolution or "
        "linear layer makes its input"
    }
    assert_close(result(image(2)), model(image(2)), **EXACT)


def with_other_statistics(call, **modules):
    model = Functional(call, **modules)
    model.register_buffer("other_mean", torch.empty(6))
    model.register_buffer("other_running_var", torch.empty(6))
    return prepared(model)


def test_of_several_functional_batch_norms_one_whose_input_is_kept_stays_alone():
    def call(self, x):
        y = F.batch_norm(self.keeper(x), self.other_mean, self.other_running_var)
        return self._norm(self.conv(y.relu()))

    model = with_other_statistics(call, keeper=Keeper(4, 6, 1), conv=nn.Conv2d(6, 6, 3))
    result, report = normlab.fold(model, image(2))
    assert report.folded == {"batch_norm1": ("conv", "before")}
    (why,) = report.left.values()
    assert "what keeper, the layer before it, returns is kept" in why
    assert_close(result(image(2)), model(image(2)), **EXACT)


def test_a_functional_batch_norm_that_depends_on_the_mode_keeps_others_from_being_folded():
    def call(self, x):
        y = self._norm(self.keeper(x)).relu()
        return F.batch_norm(self.conv(y), self.other_mean, self.other_running_var)

    model = with_other_statistics(call, keeper=Keeper(4, 6, 1), conv=nn.Conv2d(6, 6, 3))
    _, report = normlab.fold(model, image(2))
    assert not report.folded
    (why,) = report.left.values()
    assert "what keeper, the layer before it, returns is kept" in why


def test_a_functional_batch_norm_without_running_statistics_is_not_one_that_stays():
    def call(self, x):
        return self._norm(self.conv(F.batch_norm(x, None, None, training=True)))

    _, report = normlab.fold(prepared(Functional(call, conv=nn.Conv2d(4, 6, 3))), image(2))
    assert report.folded == {"batch_norm1": ("conv", "before")}
    assert report.left == {}


def test_under_inference_mode_around_it_and_within():
    def forward(self, x):
        with torch.inference_mode():
            return self.norm(self.conv(x))

    model = net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    with torch.inference_mode():
        result, _ = assert_folded(model, image(2), {"norm": ("conv", "before")})
    assert not result.conv.weight.is_inference()


def test_scripted_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated, and used.
        scripted = torch.jit.script(nn.ReLU())
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), scripted).double().eval()
    assert normlab.fold(model, image(2))[1].folded
    with pytest.raises(InputError, match="got a RecursiveScriptModule: fold before"):
        normlab.fold(scripted, image(2))
