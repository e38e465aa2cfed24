import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab import kernels
from normlab.kernels import BUILT, build

pytestmark = pytest.mark.skipif(not BUILT, reason="the kernels are not built")


def instruction_sets():
    """Those that this processor has."""
    known = list(build.instruction_sets())
    return known[: known.index(kernels._instruction_set()) + 1] if BUILT else []


each_instruction_set = pytest.mark.parametrize("instructions", instruction_sets())

GUARD = 64
"""Values on either side of a result that nobody may write to: four of the widest vectors'."""


class Result:
    """Memory for a tensor of a shape, with guards around it."""

    def __init__(self, shape, dtype):
        count = torch.Size(shape).numel()
        self.memory = torch.full((GUARD + count + GUARD,), 7.0, dtype=dtype)
        self.tensor = self.memory[GUARD : GUARD + count].view(shape)

    def check(self):
        assert (self.memory[:GUARD] == 7).all()
        assert (self.memory[-GUARD:] == 7).all()
        return self.tensor


def pointers(tensors):
    return [None if each is None else each.data_ptr() for each in tensors]


def call(name, sizes, tensors, dtype, instructions):
    struct = (ctypes.c_int64 * len(sizes))(*sizes)
    function = kernels._library()[f"{name}_{instructions}"]
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, *[ctypes.c_void_p] * len(tensors)]
    function.restype = None
    function(dtype == torch.float64, struct, *pointers(tensors))


@each_instruction_set
@settings(derandomize=True, max_examples=600, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_products_are_torchs(instructions, data, dtype):
    # Sides within a panel, of some panels, and more than is summed at a time.
    sides = st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 150), st.integers(250, 270))
    m, n, k = (data.draw(sides) for _ in range(3))
    turned = a_turned, b_turned = data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(m + n + k)
    a, b, bias = (
        torch.randn(shape, dtype=dtype, generator=generator)
        for shape in ((k, m) if a_turned else (m, k), (n, k) if b_turned else (k, n), n)
    )
    if not data.draw(st.booleans()):
        bias = None
    expected = (a.T if a_turned else a).double() @ (b.T if b_turned else b).double()
    c = Result([m, n], dtype)
    call("normlab_product", [m, n, k, *turned], [bias, a, b, c.tensor], dtype, instructions)
    # Each is a sum of k numbers of about 1, whose errors add up by chance.
    tolerance = (1e-14 if dtype == torch.float64 else 5e-6) * (k + 1) ** 0.5
    torch.testing.assert_close(
        c.check().double(),
        expected if bias is None else expected + bias,
        rtol=0,
        atol=tolerance,
    )


def convolutions(draw):
    window = [draw(st.integers(1, 5)) for _ in range(2)]
    rims = [draw(st.integers(0, size - 1)) for size in window]
    image = [
        draw(st.integers(max(1, size - 2 * rim), 21))
        for size, rim in zip(window, rims, strict=True)
    ]
    # More images than a vector has lanes, and fewer.
    images, inner, outer = (draw(st.integers(1, most)) for most in (40, 7, 14))
    return images, inner, *image, outer, *window, *rims


@each_instruction_set
@settings(derandomize=True, max_examples=600, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.booleans())
def test_convolutions_are_torchs(instructions, data, dtype, has_bias, wants_by_x):
    sizes = images, inner, height, width, outer, *window = convolutions(data.draw)
    window, rims = window[:2], window[2:]
    generator = torch.Generator().manual_seed(sum(sizes))

    def some(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    x, weight = some(images, inner, height, width), some(outer, inner, *window)
    bias = some(outer) if has_bias else None
    exact = [each.double().requires_grad_() for each in (x, weight)]
    with_bias = torch.zeros(outer).double() if bias is None else bias.double()
    exact.append(with_bias.requires_grad_())
    expected = F.conv2d(*exact, padding=rims)
    y = Result(expected.shape, dtype)
    call("normlab_convolve", sizes, [x, weight, bias, y.tensor], dtype, instructions)
    grad = some(*expected.shape)
    by = [Result(each.shape, dtype) for each in (x, weight, with_bias)]
    found = [by[0].tensor if wants_by_x else None, by[1].tensor, by[2].tensor if has_bias else None]
    call("normlab_convolve_backward", sizes, [grad, x, weight, *found], dtype, instructions)
    expected_by = torch.autograd.grad(expected, exact, grad.double())
    # Sums of up to some thousand numbers of about 1, each rounded a few times on its way.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    pairs = [(y, expected), *zip(by, expected_by, strict=True)]
    wanted = [True, wants_by_x, True, has_bias]
    for (result, value), is_wanted in zip(pairs, wanted, strict=True):
        if is_wanted:
            torch.testing.assert_close(
                result.check().double(), value.detach(), rtol=tolerance, atol=tolerance
            )
        else:
            assert (result.memory == 7).all()


@each_instruction_set
@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_poolings_are_torchs(instructions, data, dtype, average):
    window = [data.draw(st.integers(1, 3)) for _ in range(2)]
    height, width = (data.draw(st.integers(size, 11)) for size in window)
    planes = data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(height + 20 * width)
    # Few values, so that several of a window are its largest.
    x = torch.randint(3, (planes, height, width), generator=generator).to(dtype).requires_grad_()
    expected = (F.avg_pool2d if average else F.max_pool2d)(x, window)
    grad = torch.randn(expected.shape, dtype=dtype, generator=generator)
    (expected_by,) = torch.autograd.grad(expected, x, grad)
    sizes = [average, planes, height, width, *window]
    y, by = Result(expected.shape, dtype), Result(x.shape, dtype)
    by.tensor.zero_()  # What no window has is left as it is.
    call("normlab_pool", sizes, [x, y.tensor], dtype, instructions)
    call("normlab_pool_backward", sizes, [grad, x, by.tensor], dtype, instructions)
    torch.testing.assert_close(y.check(), expected.detach())
    torch.testing.assert_close(by.check(), expected_by)


@each_instruction_set
@pytest.mark.parametrize("width", [2, 3])
def test_what_is_no_number_is_the_largest(instructions, width):
    x = torch.ones(1, 1, 2, width)
    x[..., 1] = float("nan")
    x.requires_grad_()
    expected = F.max_pool2d(x, (2, width))
    (expected_by,) = torch.autograd.grad(expected, x, torch.full_like(expected, 5.0))
    y, by = torch.empty(1), torch.zeros(1, 1, 2, width)
    sizes, grad = [False, 1, 2, width, 2, width], torch.tensor([5.0])
    call("normlab_pool", sizes, [x, y], torch.float32, instructions)
    call("normlab_pool_backward", sizes, [grad, x, by], torch.float32, instructions)
    assert y.isnan().all()
    assert by.equal(expected_by)


def test_threads_do_not_meet():
    """Kernels that are called at the same time share nothing."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((32, 3, 12, 12), (4, 3, 3, 3), (32, 4, 10, 10))
    )

    def work(scale):
        of = torch.float32, kernels._instruction_set()
        convolution, pooling = [32, 3, 12, 12, 4, 3, 3, 0, 0], [1, 128, 10, 10, 2, 2]
        y, pooled, by_y = torch.empty(32, 4, 10, 10), torch.empty(32, 100), torch.empty_like(grad)
        by, c = [torch.empty_like(x), torch.empty_like(weight)], torch.empty(32, 32)
        call("normlab_convolve", convolution, [scale * x, weight, None, y], *of)
        tensors = [grad, scale * x, weight, *by, None]
        call("normlab_convolve_backward", convolution, tensors, *of)
        call("normlab_pool", pooling, [y, pooled], *of)
        call("normlab_pool_backward", pooling, [pooled, y, by_y], *of)
        call("normlab_product", [32, 32, 100, 0, 1], [None, pooled, pooled, c], *of)
        return [y, *by, pooled, by_y, c]

    expected = [work(1 + scale) for scale in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: work(1 + i % 8), range(400)))
    assert all(
        torch.equal(*pair)
        for i, each in enumerate(found)
        for pair in zip(each, expected[i % 8], strict=True)
    )
