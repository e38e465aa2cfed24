import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from normlab import kernels
from normlab.kernels import build
from normlab.layers import BatchNorm1d, BatchNorm2d, batch_norm, fused, native
from normlab.layers.functional import activate, moments, normalize

ACTIVATIONS = [None, "relu", "leaky_relu", "sigmoid", "silu"]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}

pytestmark = pytest.mark.skipif(not native.BUILT, reason="the kernels are not built")


@pytest.fixture(autouse=True, scope="module")
def _always_by_kernel():
    small, fused.SMALL = fused.SMALL, 0
    yield
    fused.SMALL = small


# Of every rank, with runs on both sides of the length from which they are read as runs.
SPATIAL = [
    *((), (1,), (7,), (63,), (64,), (65,), (1500,)),
    *((1, 1), (4, 4), (5, 13), (16, 16), (2, 3, 5), (4, 4, 8)),
]
SHAPES = [
    (samples, channels, *spatial)
    for spatial in SPATIAL
    for samples in (2, 3, 5, 17, 70, 130)
    for channels in (1, 2, 3, 6, 33, 64, 65)
    if samples * channels * math.prod(spatial) <= 40_000
]


def reference(x, residual, weight, bias, running, eps, training):
    """The same in float64, by operations that autograd differentiates."""
    mean, var = moments(x)[:2] if training else running
    z = normalize(x, mean, var, weight, bias, eps)
    return z if residual is None else z + residual, mean, var


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    grad_layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(sorted(UNIT, key=str)),
    activation=st.sampled_from(ACTIVATIONS),
    has_residual=st.booleans(),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    training=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, -40.0]),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_the_kernels_are_within_rounding_of_the_float64_reference(
    shape,
    layout,
    grad_layout,
    dtype,
    activation,
    has_residual,
    has_weight,
    has_bias,
    training,
    offset,
    eps,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    arithmetic = native.ARITHMETIC[dtype]
    x = LAYOUTS[layout]((draw(*shape) * 2 + offset).to(dtype))
    residual = LAYOUTS[grad_layout](draw(*shape).to(dtype)) if has_residual else None
    weight = (draw(shape[1]).abs() + 0.1).to(arithmetic) if has_weight else None
    bias = draw(shape[1]).to(arithmetic) if has_bias else None
    running = (draw(shape[1]) + offset).to(arithmetic), (draw(shape[1]).abs() + 0.1).to(arithmetic)

    exact = [
        None if t is None else t.double().requires_grad_() for t in (x, residual, weight, bias)
    ]
    z, mean, var = reference(*exact, [r.double() for r in running], eps, training)
    expected = activate(z, activation, 0.01)

    def wide(per_channel):
        return per_channel.detach().view(1, -1, *[1] * (x.ndim - 2))

    normalized = ((x.double() - wide(mean)) * wide(var + eps).rsqrt()).abs().max().item()
    slope = (var.detach() + eps).rsqrt().max().item()
    slope *= 1 if weight is None else weight.max().item()
    scale_z = z.detach().abs().max().item() + 1
    if dtype == torch.float64:  # The reference rounds too, and so does the mean.
        scale_z = 4 * (scale_z + (abs(offset) + 8) * slope)
    # At a kink of the activation rounding decides on which side a value lies.
    kink = z.detach().abs() < 64 * UNIT[dtype] * scale_z
    grad = LAYOUTS[grad_layout](draw(*shape).masked_fill(kink, 0).to(dtype))
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())

    leaves = [
        None if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)
    ]
    moved = [r.clone() for r in running]
    y = batch_norm(
        leaves[0], *moved, *leaves[2:], training, 0.25, eps,
        activation=activation, residual=leaves[1],
    )  # fmt: skip
    got = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)

    # Each bound is a number of roundings times the largest value that is rounded on the way.
    unit = UNIT[dtype]
    assert y.dtype == dtype
    assert_close(y.double(), expected.detach(), rtol=0, atol=16 * unit * scale_z)
    names = [name for name, leaf in zip("xrwb", leaves, strict=True) if leaf is not None]
    largest = grad.double().abs().max().item() + 1e-3
    summed = (x.numel() / shape[1]) ** 0.5 * (scale_z + normalized)  # Roundings partly cancel.
    magnitude = {"x": slope * (scale_z + normalized**2), "r": scale_z, "w": summed, "b": summed}
    for name, mine, right in zip(names, got, wanted, strict=True):
        bound = 32 * unit * largest * magnitude[name]
        assert_close(mine.double(), right, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    if training:
        count = x.numel() / shape[1]
        batch = mean.detach(), var.detach() * count / (count - 1)
        for before, now, new in zip(running, moved, batch, strict=True):
            right = 0.75 * before.double() + 0.25 * new
            bound = 16 * UNIT[arithmetic] * max(right.abs().max().item(), (offset + 8) ** 2)
            assert_close(now.double(), right, rtol=0, atol=bound)
    else:
        assert all(torch.equal(*pair) for pair in zip(running, moved, strict=True))


def run(layer, x, grad, residual=None):
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(leaf, residual)
    y.backward(grad)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]


def other_instruction_sets():
    """Those that this processor has, but for the one that it uses."""
    known = list(build.instruction_sets())
    return known[: known.index(kernels._instruction_set())] if native.BUILT else []


@pytest.mark.parametrize("name", other_instruction_sets())
@pytest.mark.parametrize("dtype", sorted(UNIT, key=str))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_every_instruction_set_computes_the_same(layout, activation, dtype, name, monkeypatch):
    generator = torch.Generator().manual_seed(6)
    cases = []
    for shape in [(9, 5, 23, 25), (40, 3, 6, 7), (130, 70, 5, 2)]:
        drawn = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        cases.append([LAYOUTS[layout](each) for each in drawn])

    def outcomes():
        native._kernels.cache_clear()
        found = []
        for x, grad, residual in cases:
            layer = BatchNorm2d(x.shape[1], activation=activation, dtype=dtype)
            added = residual if activation in (None, "relu") else None
            for each in (None, added):
                found += [*run(layer, x, grad, each), *(b.clone() for b in layer.buffers())]
        return found

    mine = outcomes()
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "_instruction_set", lambda: name)
        other = outcomes()
        assert all(each.__name__.endswith(f"_{name}") for each in native._kernels())
    native._kernels.cache_clear()
    for a, b in zip(mine, other, strict=True):
        assert_close(a, b, rtol=0, atol=64 * UNIT[dtype] * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(9, 11), (2, 3)])
def test_replicas_are_normalized_as_each_is_alone(size, layout, training):
    replicas, samples, channels = 3, 4, 5
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(replicas * samples, channels, *size, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    weight, bias, mean, var = torch.rand(4, replicas * channels, generator=generator) + 0.1

    def passes(x, grad, weight, bias, mean, var, count):
        options = (1e-5, "relu", 0.01, training, count)
        running = (mean, var) if not training else (None, None)
        y, statistics = native.forward(x, None, weight, bias, *running, *options)
        wanted = [True, True]
        by_x, _, *rest = native.backward(grad, x, None, weight, bias, statistics, *options, wanted)
        return y, by_x, *rest

    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    together = passes(x, grad, weight, bias, mean, var, replicas)
    parts = zip(
        *(each.split(samples) for each in (x, grad)),
        *(each.split(channels) for each in (weight, bias, mean, var)),
        strict=True,
    )
    alone = [passes(*part, 1) for part in parts]
    for mine, each in zip(together, zip(*alone, strict=True), strict=True):
        assert_close(mine, torch.cat(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
# float64 shows in which order the sums were taken; float32 mostly rounds it away.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(40, 2, 30, 30), (24, 70, 15, 15), (300, 16, 5, 5), (5000, 40), (3, 1, 300, 300)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_number_of_threads_does_not_change_a_bit(layout, shape, dtype, activation):
    generator = torch.Generator().manual_seed(1)
    x, grad = (
        LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=dtype) + 2) for _ in range(2)
    )
    constructor = BatchNorm1d if len(shape) == 2 else BatchNorm2d
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 4, 16):
            torch.set_num_threads(threads)
            layer = constructor(shape[1], activation=activation, dtype=dtype)
            outcomes.append([*run(layer, x, grad), *layer.buffers()])
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        for first, other in zip(outcomes[0], outcome, strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_bfloat16_is_rounded_once_to_the_nearest(layout, activation):
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(16, 6, 12, 12, generator=generator).bfloat16() for _ in range(2))
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    outcomes = []
    for cast in (torch.Tensor.bfloat16, torch.Tensor.float):
        leaf = cast(x).detach().clone().requires_grad_()
        y = batch_norm(leaf, None, None, training=True, activation=activation)
        y.backward(cast(grad))
        outcomes.append((y.detach(), leaf.grad))
    # Half a unit in the last place of bfloat16, and some of float32 from another order of terms.
    for half, full in zip(*outcomes, strict=True):
        assert ((half.float() - full).abs() <= 1.01 * 2**-8 * full.abs() + 1e-6).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_kernels_work_in_torchs_own_threads():
    script = """
import os, torch
from normlab import BatchNorm2d
torch.set_num_threads(3)
x = torch.randn(64, 32, 16, 16)
torch.nn.BatchNorm2d(32)(x)  # torch starts its threads.
before = len(os.listdir("/proc/self/task"))
BatchNorm2d(32)(x)
print(before, len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before == after


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(14, 14), (3, 3)])
def test_a_mean_far_above_the_deviation_costs_no_digits(size, layout):
    generator = torch.Generator().manual_seed(2)
    x = LAYOUTS[layout](1e4 + 0.01 * torch.randn(256, 8, *size, generator=generator))
    exact = batch_norm(x.double(), None, None, training=True, eps=1e-8)
    y = batch_norm(x, None, None, training=True, eps=1e-8)
    stock = F.batch_norm(x, None, None, training=True, eps=1e-8)
    assert (y - exact).abs().max() < 1e-5
    assert (stock - exact).abs().max() > 1e-3  # torch multiplies before it takes the mean away.


@pytest.mark.parametrize("outliers", [1, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(14, 14), (3, 3)])
def test_outliers_where_the_shift_is_guessed_cost_no_digits(size, layout, outliers):
    x = torch.randn(64, 4, *size, generator=torch.Generator().manual_seed(3))
    x[:, :, 0, 0] = 0  # Every guess is made of values like this one, or near.
    x[:outliers, :, 0, 0] = 1e6
    check_statistics(LAYOUTS[layout](x))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(14, 14), (3, 3)])
def test_samples_far_from_the_others_cost_no_digits(size, layout):
    x = torch.randn(64, 4, *size, generator=torch.Generator().manual_seed(3))
    x[::8] += 1e4  # Where rows are short, guesses are made of these samples alone.
    check_statistics(LAYOUTS[layout](x))


def check_statistics(x):
    _, batch = fused.normalize_by_batch(x, None, None, 1e-5)
    right = moments(x.double())
    assert_close(batch.mean, right.mean, rtol=2e-6, atol=0)
    assert_close(batch.var, right.var, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_value_that_is_not_finite_spoils_its_channel_and_no_other(layout, activation, bad):
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    x[3, 1, 4, 4] = bad
    y = batch_norm(LAYOUTS[layout](x), None, None, training=True, activation=activation)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends_of_the_range(activation):
    z = torch.tensor([-float("inf"), -1e30, -200.0, -87.5, -1.0, -0.0, 0.0, 1.0, 89.0, 1e30])
    x = z.repeat(4).unsqueeze(1)
    neutral = torch.zeros(1), torch.ones(1)
    y = batch_norm(x, *neutral, eps=0.0, activation=activation)
    assert_close(y, activate(x, activation), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_without_the_library_torch_does_the_work_after_one_warning(monkeypatch):
    monkeypatch.setattr(native, "BUILT", False)
    native.warn_once.cache_clear()
    x = torch.randn(64, 8, 16, 16)
    layer, stock = BatchNorm2d(8, activation="relu"), nn.BatchNorm2d(8)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler, and run python -m normlab"):
        y = layer(x)
    assert torch.equal(y, stock(x).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    native.warn_once.cache_clear()


def test_a_build_without_a_compiler_says_so_and_leaves_no_trace(tmp_path):
    environment = os.environ | {"CXX": "false"}
    library = tmp_path / "kernels.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        with pytest.raises(OSError, match=r"false .* failed"):
            build.build(library)
        patch.delenv("CXX")
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(OSError, match=r"no C\+\+ compiler was found: install one"):
            build.build(library)
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "normlab.kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("normlab: false")
    assert build.LIBRARY.exists()


@pytest.mark.slow
def test_more_values_than_32_bits_count():
    half = 2**30 + 4
    x = torch.zeros(2, 1, half, dtype=torch.bfloat16)
    x[0], x[1, 0, ::2] = 1, 4
    running = torch.zeros(1), torch.ones(1)
    y = batch_norm(x, *running, training=True, momentum=1.0)
    assert_close(running[0], torch.tensor([1.5]))
    assert_close(running[1], torch.tensor([2.25]), rtol=1e-5, atol=0)
    assert_close(
        y[:, 0, -2:].float(), torch.tensor([[-1 / 3, -1 / 3], [5 / 3, -1]]), rtol=0.01, atol=0
    )
