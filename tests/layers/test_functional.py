import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from normlab.layers import batch_norm, batch_norm_backward, moments

pytestmark = pytest.mark.usefixtures("kernels")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
LEAVES = ("input", "weight", "bias")
SHAPES = [(7, 3), (3, 2, 2, 3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, generator=None, dtype=torch.float64):
    return torch.randn(*shape, generator=generator or seeded(), dtype=dtype)


def along_channels(per_channel, x):
    return per_channel.view(1, -1, *[1] * (x.ndim - 2))


def over_values(x):
    return [dim for dim in range(x.ndim) if dim != 1]


def formula(x, weight=None, bias=None, eps=1e-5):
    """Batch normalization in training as plain arithmetic, for autograd to differentiate."""
    count = x.numel() / x.shape[1]
    mean = x.sum(over_values(x), keepdim=True) / count
    var = ((x - mean) ** 2).sum(over_values(x), keepdim=True) / count
    y = (x - mean) / (var + eps).sqrt()
    y = y if weight is None else y * along_channels(weight, x)
    return y if bias is None else y + along_channels(bias, x)


@st.composite
def shapes_with_values(draw):
    sizes = st.lists(st.integers(1, 4), min_size=0, max_size=3)
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), sizes)
    n, channels, spatial = draw(shapes.filter(lambda s: s[0] * math.prod(s[2]) > 1))
    return n, channels, *spatial


def outcome(function, x, cotangent, weight, bias, running, training, momentum, eps, learned=LEAVES):
    """Everything a call leaves behind, from tensors that no other call shares."""
    leaves = dict(zip(LEAVES, (x, weight, bias), strict=True))
    leaves = {
        name: leaf.clone().requires_grad_(name in learned)
        for name, leaf in leaves.items()
        if leaf is not None
    }
    running = [None, None] if running is None else [r.clone() for r in running]
    y = function(
        leaves["input"], *running, leaves.get("weight"), leaves.get("bias"), training, momentum, eps
    )
    if y.requires_grad:
        y.backward(cotangent)
    return {
        "output": y.detach(),
        "running": [r for r in running if r is not None],
        **{f"grad_{name}": leaf.grad for name, leaf in leaves.items()},
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=shapes_with_values(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    training=st.booleans(),
    has_running=st.booleans(),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    learned=st.just(LEAVES) | st.sets(st.sampled_from(LEAVES)),
    momentum=st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0, 1),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]) | st.floats(1e-5, 1.0),
    seed=st.integers(0, 2**31),
)
def test_output_gradients_and_running_statistics_match_torch(
    shape, layout, training, has_running, has_weight, has_bias, learned, momentum, eps, seed
):
    generator = seeded(seed)
    x, cotangent = (LAYOUTS[layout](randn(*shape, generator=generator) + i) for i in (3, 0))
    mean, weight, bias = randn(3, shape[1], generator=generator)
    var = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1
    arguments = {
        "x": x,
        "cotangent": cotangent,
        "weight": weight if has_weight else None,
        "bias": bias if has_bias else None,
        "running": (mean, var) if has_running or not training else None,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "learned": learned,
    }
    assert_close(outcome(batch_norm, **arguments), outcome(F.batch_norm, **arguments), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(training, has_weight, has_bias, shape):
    generator = seeded()
    running = randn(shape[1]), torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    leaves = {"input": randn(*shape, generator=generator)}
    if has_weight:
        leaves["weight"] = randn(shape[1], generator=generator)
    if has_bias:
        leaves["bias"] = randn(shape[1], generator=generator)

    def call(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        statistics = (None, None) if training else running
        return batch_norm(
            named["input"], *statistics, named.get("weight"), named.get("bias"), training, eps=1e-3
        )

    tensors = [leaf.requires_grad_() for leaf in leaves.values()]
    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_weight", [True, False])
def test_backward_is_the_derivative_of_the_formula(has_weight, shape):
    generator = seeded()
    x = randn(*shape, generator=generator).requires_grad_()
    weight, bias = (randn(shape[1], generator=generator).requires_grad_() for _ in range(2))
    grad_output = randn(*shape, generator=generator)
    if not has_weight:
        weight = torch.ones_like(weight, requires_grad=True)
    expected = torch.autograd.grad(formula(x, weight, bias, 1e-2), (x, weight, bias), grad_output)

    var, mean = torch.var_mean(x.detach(), over_values(x), correction=0)
    actual = batch_norm_backward(
        grad_output, x.detach(), mean, var, weight.detach() if has_weight else None, 1e-2
    )
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_output_is_the_formula(shape):
    x, weight, bias = randn(*shape), torch.arange(1.0, shape[1] + 1), torch.arange(shape[1])
    actual = batch_norm(x, None, None, weight.double(), bias.double(), training=True, eps=0.3)
    assert_close(actual, formula(x, weight.double(), bias.double(), eps=0.3), **EXACT)


def test_variance_survives_a_mean_far_above_the_deviation():
    x = 1e4 + 1e-2 * randn(512, 3, 4, 4)
    x = x.float()
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (naive <= 0).all()  # The case is one where E[x²] − μ² has lost every digit.

    expected = x.double().var((0, 2, 3), correction=0).float()
    assert_close(moments(x).var, expected, rtol=1e-2, atol=0)
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    y = batch_norm(x, running_mean, running_var, training=True, momentum=1.0, eps=1e-12)
    assert_close(running_var, expected, rtol=1e-2, atol=0)
    assert_close(running_mean, torch.full((3,), 1e4), rtol=1e-6, atol=0)
    assert_close(y.var((0, 2, 3)), torch.ones(3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_computed_in_float32_and_returned_in_half(training, dtype):
    generator = seeded()
    # Above 256 neighbours in bfloat16 lie 2 apart, so half-precision statistics would be far off.
    half = (300 + 20 * randn(64, 3, 5, generator=generator)).to(dtype)
    weight, bias = randn(2, 3, generator=generator, dtype=torch.float32)
    cotangent = randn(64, 3, 5, generator=generator).to(dtype)
    running = torch.full((3,), 299.0), torch.full((3,), 350.0)
    arguments = weight, bias, running, training, 0.1, 1e-5

    actual = outcome(batch_norm, half, cotangent, *arguments)
    assert actual["output"].dtype == actual["grad_input"].dtype == dtype
    assert actual["running"][0].dtype == actual["grad_weight"].dtype == torch.float32
    full = outcome(batch_norm, half.float(), cotangent.float(), *arguments)
    # float16 goes through torch's kernel, which rounds once more where the mean is large.
    atol = 0 if dtype == torch.bfloat16 else 1e-3
    assert_close(actual["output"], full["output"].to(dtype), rtol=0, atol=atol)
    assert_close(actual["grad_input"], full["grad_input"].to(dtype))
    stock = outcome(F.batch_norm, half, cotangent, *arguments)
    assert_close(actual["running"], stock["running"])
    assert_close(actual["grad_weight"], full["grad_weight"])


def test_moments_of_half_precision_are_those_of_the_same_values_in_float32():
    half = (300 + 20 * randn(64, 3)).bfloat16()
    assert moments(half).mean.dtype == moments(half).var.dtype == torch.float32
    assert_close(moments(half), moments(half.float()), rtol=0, atol=0)


def test_running_statistics_in_bfloat16_stay_close_to_torch():
    x = (3 + 2 * randn(64, 3)).bfloat16()
    weight, bias = torch.ones(2, 3, dtype=torch.bfloat16)
    running = weight.clone(), bias.clone()
    arguments = torch.ones_like(x), weight, bias, running, True, 0.25, 1e-5
    actual, expected = (outcome(f, x, *arguments) for f in (batch_norm, F.batch_norm))
    assert all(r.dtype == torch.bfloat16 for r in actual["running"])
    assert_close(actual["running"], expected["running"])
    full = formula(x.double(), weight.double(), bias.double())
    assert_close(actual["output"], full.bfloat16())


def test_momentum_may_be_a_tensor():
    x, running = randn(6, 3), (torch.zeros(3).double(), torch.ones(3).double())
    arguments = torch.ones_like(x), None, None, running, True
    as_tensor = outcome(batch_norm, x, *arguments, torch.tensor(0.3, dtype=torch.float64), 1e-5)
    assert_close(as_tensor, outcome(batch_norm, x, *arguments, 0.3, 1e-5), **EXACT)


def test_in_evaluation_a_tensor_of_momentum_moves_nothing():
    x, running = randn(6, 3), (torch.zeros(3).double(), torch.ones(3).double())
    y = batch_norm(x, *running, momentum=torch.tensor(0.3))
    assert_close(y, F.batch_norm(x, *running), **EXACT)
    assert_close(running, (torch.zeros(3).double(), torch.ones(3).double()), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_of_the_deviation_and_shift_of_the_mean_give_back_the_input(shape):
    x = 5 + 3 * randn(*shape)
    mean = x.mean(over_values(x))
    scale = (x.var(over_values(x), correction=0) + 1e-3).sqrt()
    assert_close(batch_norm(x, None, None, scale, mean, training=True, eps=1e-3), x, **EXACT)


def test_channels_last_stays_channels_last():
    x = LAYOUTS["channels last"](randn(2, 3, 4, 4))
    y = batch_norm(x, None, None, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
def test_an_empty_batch_gives_an_empty_output_and_leaves_the_running_statistics(shape, training):
    running, weight, bias = randn(2, 3).square(), randn(3), randn(3)
    empty = torch.zeros(shape, dtype=torch.float64)
    arguments = empty, weight, bias, running, training, 0.1, 1e-5
    actual = outcome(batch_norm, empty, *arguments)
    assert actual["output"].shape == actual["grad_input"].shape == shape
    assert_close(torch.stack(actual["running"]), running, rtol=0, atol=0)
    assert_close(actual, outcome(F.batch_norm, empty, *arguments), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_a_single_value_in_a_channel_cannot_be_trained_on(shape):
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    expected = r"Expected more than 1 value per channel when training, got input size \(1, 3.*eval"
    with pytest.raises(ValueError, match=expected):
        batch_norm(torch.ones(shape), running_mean, running_var, training=True)
    assert_close((running_mean, running_var), (torch.zeros(3), torch.ones(3)), rtol=0, atol=0)
    assert batch_norm(torch.ones(shape), running_mean, running_var).shape == shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", ["running_mean", "running_var", "weight", "bias"])
def test_a_tensor_of_another_number_of_channels_is_named_with_the_sizes(wrong, training):
    names = "running_mean", "running_var", "weight", "bias"
    per_channel = {name: torch.ones(5 if name == wrong else 3) for name in names}
    expected = rf"{wrong} should contain 3 elements.*\(2, 3, 4, 4\), not 5"
    with pytest.raises(RuntimeError, match=expected):
        batch_norm(torch.ones(2, 3, 4, 4), **per_channel, training=training)


@pytest.mark.parametrize("present", [(False, False), (False, True), (True, False)])
def test_evaluation_needs_both_running_statistics(present):
    mean, var = (torch.ones(3) if is_present else None for is_present in present)
    with pytest.raises(RuntimeError, match="training=False needs running_mean and running_var"):
        batch_norm(torch.ones(2, 3), mean, var)


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"shape \(N, C, …\), got \(3,\)"):
        batch_norm(torch.ones(3), None, None, training=True)
