import copy
import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from normlab.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

pytestmark = pytest.mark.usefixtures("kernels")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d),
    (BatchNorm2d, nn.BatchNorm2d),
    (BatchNorm3d, nn.BatchNorm3d),
]
BY_SPATIAL = [PAIRS[0], *PAIRS]

each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
each_affine = pytest.mark.parametrize("affine", [True, False])
each_tracking = pytest.mark.parametrize("tracking", [True, False])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(constructor=BatchNorm2d, steps=3, **options):
    """A layer of 3 channels with parameters and statistics away from where they start."""
    layer = constructor(3, **options)
    spatial = [4] * {BatchNorm1d: 0, BatchNorm2d: 2, BatchNorm3d: 3}[constructor]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        for seed in range(steps):
            layer(5 + randn(8, 3, *spatial, seed=seed))
    return layer


def step(layer, x, cotangent):
    """Run forward, backward and a small SGD update; return all that can be seen of it."""
    x = x.requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    seen = {"output": y.detach(), "grad_input": x.grad}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            seen[f"grad_{name}"], parameter.grad = parameter.grad, None
            parameter -= 0.01 * seen[f"grad_{name}"]
    return seen | dict(layer.named_parameters()) | dict(layer.named_buffers())


@st.composite
def shapes_with_values(draw):
    sizes = st.lists(st.integers(1, 4), min_size=0, max_size=3)
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), sizes)
    n, channels, spatial = draw(shapes.filter(lambda s: s[0] * math.prod(s[2]) > 1))
    return n, channels, *spatial


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=shapes_with_values(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    momentum=st.sampled_from([None, 0.0, 0.1, 1.0]) | st.floats(0, 1),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]) | st.floats(1e-5, 1.0),
    affine=st.booleans(),
    tracking=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_steps_in_a_row_match_torch(shape, layout, momentum, eps, affine, tracking, seed):
    generator = torch.Generator().manual_seed(seed)
    keywords = {"track_running_stats": tracking, "dtype": torch.float64}
    ours, theirs = (
        constructor(shape[1], eps, momentum, affine, **keywords)
        for constructor in BY_SPATIAL[len(shape) - 2]
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(generator=generator)
    theirs.load_state_dict(ours.state_dict())
    for number, training in enumerate([False, True, True, True, False]):
        x, cotangent = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        seen = [
            step(layer.train(training), LAYOUTS[layout](x.clone() + number), cotangent)
            for layer in (ours, theirs)
        ]
        assert_close(*seen, **EXACT)


@each_pair
@each_affine
@each_tracking
def test_state_dicts_have_torchs_keys_and_load_both_ways(ours, theirs, affine, tracking):
    options = {"affine": affine, "track_running_stats": tracking}
    layer, stock = trained(ours, **options), theirs(3, **options)
    shapes = [{k: v.shape for k, v in x.state_dict().items()} for x in (layer, stock)]
    assert shapes[0] == shapes[1]
    stock.load_state_dict(layer.state_dict(), strict=True)
    assert_close(dict(stock.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    fresh = ours(3, **options)
    fresh.load_state_dict(stock.state_dict(), strict=True)
    assert_close(dict(fresh.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


@each_pair
def test_it_is_a_torch_layer_with_torchs_arguments_and_repr(ours, theirs):
    assert issubclass(ours, theirs)
    assert ours is not theirs
    parameters = list(inspect.signature(ours).parameters.values())
    for mine, stock in zip(parameters, inspect.signature(theirs).parameters.values(), strict=False):
        assert (mine.name, mine.default, mine.kind) == (stock.name, stock.default, stock.kind)
    extras = parameters[len(inspect.signature(theirs).parameters) :]
    assert all(extra.kind is extra.KEYWORD_ONLY for extra in extras)
    arguments = {"eps": 1e-3, "momentum": None, "affine": False, "track_running_stats": False}
    assert repr(ours(7, **arguments)) == repr(theirs(7, **arguments))


@each_pair
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_class_settings_and_state_and_shares_nothing(ours, theirs, copied):
    layer = trained(ours, eps=0.2, momentum=0.3).eval()
    twin = copied(layer)
    assert type(twin) is ours
    assert not isinstance(theirs(3), ours)
    assert (repr(twin), twin.training) == (repr(layer), False)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert_close(dict(twin.state_dict()), before, rtol=0, atol=0)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(1)
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_in_evaluation_a_sample_does_not_depend_on_the_others():
    layer = trained().eval()
    batch, others = randn(6, 3, 4, 4), 100 + randn(6, 3, 4, 4, seed=1)
    others[2] = batch[2]
    assert_close(layer(others)[2], layer(batch)[2], rtol=0, atol=0)
    assert_close(layer(batch[2:3])[0], layer(batch)[2])
    layer.train()
    assert not torch.allclose(layer(others)[2], layer(batch)[2], atol=0.1)


def test_running_statistics_move_in_training_alone():
    layer = trained()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert set(before) == {"running_mean", "running_var", "num_batches_tracked"}
    layer.eval()(2 * randn(8, 3, 4, 4))
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    layer.train()(2 * randn(8, 3, 4, 4))
    for name, buffer in layer.named_buffers():
        assert (buffer != before[name]).all(), name


def test_without_running_statistics_evaluation_uses_those_of_the_batch():
    layer = BatchNorm2d(3, track_running_stats=False).eval()
    y = layer(7 + 3 * randn(8, 3, 4, 4))
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-4)
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_none_averages_all_batches(dtype):
    layer = BatchNorm1d(3, momentum=None, dtype=dtype)
    layer.running_mean.fill_(50)  # The first batch weighs 1: nothing of the start remains.
    batches = [seed + randn(8, 3, seed=seed, dtype=dtype) for seed in range(7)]
    for batch in batches:
        layer(batch)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else EXACT
    means, variances = zip(*((b.mean(0), b.var(0)) for b in batches), strict=True)
    assert_close(layer.running_mean, torch.stack(means).mean(0), **tolerance)
    assert_close(layer.running_var, torch.stack(variances).mean(0), **tolerance)


def test_batches_are_counted_until_the_statistics_are_reset():
    layer = trained(steps=4)
    assert layer.num_batches_tracked.item() == 4
    layer.eval()(randn(8, 3, 4, 4))
    assert layer.num_batches_tracked.item() == 4
    layer.reset_running_stats()
    assert layer.num_batches_tracked.item() == 0
    assert_close(layer.running_mean, torch.zeros(3), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_off_later_leaves_all_buffers_as_torch_does(training):
    ours, theirs = trained(), nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    outputs = []
    for layer in (ours, theirs):
        layer.track_running_stats = False
        outputs.append(layer.train(training)(1 + randn(8, 3, 4, 4)))
    assert_close(*outputs)
    assert_close(dict(theirs.named_buffers()), before, rtol=0, atol=0)
    assert_close(dict(ours.named_buffers()), before, rtol=0, atol=0)


def test_an_empty_batch_leaves_the_statistics_as_torch_does():
    ours, theirs = trained(), nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    outputs = [layer(torch.zeros(0, 3, 4, 4)) for layer in (ours, theirs)]
    assert outputs[0].shape == outputs[1].shape == (0, 3, 4, 4)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("constructor", "ranks", "expected"),
    [(BatchNorm1d, "145", "2D or 3D"), (BatchNorm2d, "235", "4D"), (BatchNorm3d, "234", "5D")],
)
def test_an_input_of_the_wrong_rank_is_refused(constructor, ranks, expected):
    for rank in map(int, ranks):
        message = rf"expected {expected} input \(got {rank}D input\)"
        with pytest.raises(ValueError, match=message):
            constructor(3)(torch.ones([3] * rank))


@pytest.mark.parametrize("training", [True, False])
def test_an_input_of_the_wrong_number_of_channels_is_refused(training):
    with pytest.raises(RuntimeError, match=r"should contain 4 elements.*\(2, 4, 5, 5\), not 3"):
        BatchNorm2d(3).train(training)(torch.ones(2, 4, 5, 5))


def test_one_value_in_a_channel_trains_nothing_but_can_be_evaluated():
    layer = BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.ones(1, 3))
    assert layer.eval()(torch.ones(1, 3)).shape == (1, 3)
