import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normlab
from normlab import BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, SyncBatchNorm
from normlab.layers import modules

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SAME = {"rtol": 0, "atol": 0}
# All but the last are small enough for torch's kernels to do the work.
SHAPES = [(6, 3), (4, 3, 5), (2, 3, 2, 3, 2), (30, 3, 20, 20)]
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
OPTIONS = {
    "activation": "silu",
    "ghost_size": 3,
    "finite_guard": True,
    "update_once": True,
    "float32_statistics": True,
    "momentum": None,
    "affine": False,
    "bias": False,
    "track_running_stats": False,
}

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_layer = pytest.mark.parametrize("constructor", [BatchNorm1d, BatchNorm2d, BatchNorm3d])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_for(shape, library=normlab, dtype=torch.float64, **options):
    """A layer in training for inputs of a shape, with parameters away from where they start."""
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    layer = getattr(library, name)(shape[1], dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2, shape[1]))
    return layer


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def outcome(forward, layer, x, cotangent, residual=None):
    """Everything a forward and a backward pass leave behind."""
    leaves = [leaf if leaf is None else leaf.clone().requires_grad_() for leaf in (x, residual)]
    layer.zero_grad()
    y = forward(*leaves)
    y.backward(cotangent)
    return {
        "output": y.detach(),
        "grads": [leaf.grad for leaf in leaves if leaf is not None],
        "parameters": {name: parameter.grad for name, parameter in layer.named_parameters()},
        "buffers": state(layer),
    }


# ---------------------------------------------------------------------- activation, residual


@each_shape
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_and_activation_follow_as_torchs_functions_would(
    activation, with_residual, training, shape
):
    ours = layer_for(shape, activation=activation).train(training)
    theirs = layer_for(shape, nn).train(training)
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)
    residual = randn(*shape, seed=2) if with_residual else None

    def stock(x, residual):
        z = theirs(x)
        return ACTIVATIONS[activation](z if residual is None else z + residual)

    expected = outcome(stock, theirs, x, cotangent, residual)
    assert_close(outcome(ours, ours, x, cotangent, residual), expected, **EXACT)


@each_shape
def test_the_slope_of_leaky_relu_can_be_chosen(shape):
    ours, theirs = (
        layer_for(shape, activation="leaky_relu", negative_slope=0.3),
        layer_for(shape, nn),
    )
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)
    expected = outcome(lambda x, _: F.leaky_relu(theirs(x), 0.3), theirs, x, cotangent)
    assert_close(outcome(ours, ours, x, cotangent), expected, **EXACT)


@pytest.mark.parametrize(
    "constructor", [BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, LazyBatchNorm1d]
)
def test_an_unknown_activation_is_refused_with_those_there_are(constructor):
    arguments = () if constructor is LazyBatchNorm1d else (3,)
    with pytest.raises(ValueError, match="'gelu': known are None, 'relu', 'leaky_relu', 'sigmoid'"):
        constructor(*arguments, activation="gelu")


# ------------------------------------------------------------------------------------- mask


MASKED = {
    "(N,)": (8, 3),
    "(N, L)": (6, 3, 7),
    "(N, H, W)": (4, 3, 5, 6),
    "(N, D, H, W)": (3, 3, 2, 4, 5),
}


def random_mask(shape):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(shape[0], *shape[2:], generator=generator) < 0.6


@pytest.mark.parametrize("padding", [0.0, 1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", MASKED.values(), ids=MASKED)
def test_what_is_real_is_normalized_as_if_there_were_no_padding(shape, activation, padding):
    ours, theirs = layer_for(shape, activation=activation), layer_for((1, 3), nn)
    mask = random_mask(shape)
    wide = mask.unsqueeze(1)
    x = torch.where(wide, 3 + randn(*shape), padding)
    cotangent = torch.where(wide, randn(*shape, seed=1), 0)
    residual = randn(*shape, seed=2)

    def real(tensor):
        return tensor.movedim(1, -1)[mask]

    def stock(x, residual):
        return ACTIVATIONS[activation](theirs(x) + residual)

    def masked(x, residual):
        return ours(x, residual, mask=mask)

    expected = outcome(stock, theirs, real(x), real(cotangent), real(residual))
    actual = outcome(masked, ours, x, cotangent, residual)
    assert_close(real(actual["output"]), expected["output"], **EXACT)
    for ours_grad, theirs_grad in zip(actual["grads"], expected["grads"], strict=True):
        assert_close(real(ours_grad), theirs_grad, **EXACT)
        assert (ours_grad.movedim(1, -1)[~mask] == 0).all()
    assert_close(actual["parameters"], expected["parameters"], **EXACT)
    assert_close(actual["buffers"], expected["buffers"], **EXACT)


def test_padding_is_normalized_by_the_statistics_of_what_is_real():
    layer, x, mask = layer_for((8, 3)), 3 + randn(8, 3), random_mask((8, 3))
    mean, std = x[mask].mean(0), (x[mask].var(0, correction=0) + 1e-5).sqrt()
    expected = (x - mean) / std * layer.weight + layer.bias
    assert_close(layer(x, mask=mask), expected, **EXACT)


@pytest.mark.parametrize("shape", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_nothing_but_true_changes_nothing(training, shape):
    layers = [layer_for(shape).train(training) for _ in range(2)]
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    masked = outcome(lambda x, _: layers[0](x, mask=mask), layers[0], x, cotangent)
    assert_close(masked, outcome(layers[1], layers[1], x, cotangent), **EXACT)


def test_in_evaluation_a_mask_changes_nothing():
    layer, x = layer_for((8, 3)), 3 + randn(8, 3)
    layer(x)
    layer.eval()
    assert_close(layer(x, mask=random_mask((8, 3))), layer(x), **SAME)


@pytest.mark.parametrize("shape", [(4, 3, 7), (3, 3, 2, 5)])
@pytest.mark.parametrize("finite_guard", [True, False])
def test_lengths_are_a_mask_along_the_last_dimension(finite_guard, shape):
    lengths = torch.tensor([5, 1, 3, 0][: shape[0]])
    mask = torch.zeros(shape[0], *shape[2:], dtype=torch.bool)
    for sample, length in enumerate(lengths):
        mask[sample, ..., :length] = True
    layers = [layer_for(shape, finite_guard=finite_guard) for _ in range(2)]
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)
    by_mask = outcome(lambda x, _: layers[0](x, mask=mask), layers[0], x, cotangent)
    by_length = outcome(lambda x, _: layers[1](x, lengths=lengths), layers[1], x, cotangent)
    assert_close(by_length, by_mask, **SAME)
    assert not torch.allclose(by_length["output"], layer_for(shape)(x))


@pytest.mark.parametrize("real", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_where_at_most_one_value_is_real_the_statistics_stay(momentum, real):
    layer, x = layer_for((4, 3, 5), momentum=momentum), 3 + randn(4, 3, 5)
    layer(x)
    before = state(layer)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask.view(-1)[:real] = True
    seen = outcome(lambda x, _: layer(x, mask=mask), layer, x, torch.ones_like(x))
    assert seen["output"].isfinite().all()
    assert seen["grads"][0].isfinite().all()
    assert_close(seen["buffers"], before, **SAME)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.ones(4, 3, dtype=torch.bool), r"\(4, 3\)"),
        (torch.ones(4, 3, 5, dtype=torch.bool), r"\(4, 3, 5\)"),
        (torch.ones(5, dtype=torch.bool), r"\(5,\)"),
        (torch.ones(4, 5), "torch.float32"),
        (torch.ones(4, 5, dtype=torch.int64), "torch.int64"),
    ],
    ids=["(4, 3)", "(4, 3, 5)", "(5,)", "float32", "int64"],
)
def test_a_wrong_mask_is_refused_with_the_shapes_and_the_layer(mask, came, training):
    layer = layer_for((4, 3, 5), dtype=torch.float32).train(training)
    with pytest.raises(RuntimeError, match="mask should be of dtype bool and shape") as error:
        layer(torch.ones(4, 3, 5), mask=mask)
    assert "(4, 5)" in str(error.value)
    assert "(4, 3, 5)" in str(error.value)
    assert "BatchNorm1d(3)" in str(error.value)
    with pytest.raises(RuntimeError, match=came):
        layer(torch.ones(4, 3, 5), mask=mask)


@pytest.mark.parametrize(
    ("shape", "lengths"), [((4, 3, 5), (3,)), ((4, 3, 5), (4, 1)), ((4, 3), (4,))]
)
def test_wrong_lengths_are_refused_with_the_shapes_and_the_layer(shape, lengths):
    layer = layer_for(shape, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="lengths should") as error:
        layer(torch.ones(shape), lengths=torch.ones(lengths, dtype=torch.int64))
    for word in (str(shape), "BatchNorm1d(3)"):
        assert word in str(error.value)


def test_a_mask_and_lengths_together_are_refused():
    mask, lengths = torch.ones(4, 5, dtype=torch.bool), torch.tensor([1, 2, 3, 4])
    with pytest.raises((ValueError, RuntimeError), match=r"mask.*lengths"):
        BatchNorm1d(3)(torch.ones(4, 3, 5), mask=mask, lengths=lengths)


# -------------------------------------------------------------------------------- ghost_size


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("shape", "ghost_size"),
    [
        *[((12, 3), size) for size in (2, 5, 11, 12, 100)],
        *[((11, 3, 4), size) for size in (1, 3, 4)],
        *[((7, 3, 80, 80), size) for size in (3, 100)],
    ],
    ids=str,
)
def test_ghosts_are_parts_of_the_batch_that_come_one_after_another(shape, ghost_size, momentum):
    ours = layer_for(shape, ghost_size=ghost_size, momentum=momentum, activation="relu")
    theirs = layer_for(shape, nn, momentum=momentum)
    ghosts = -(-shape[0] // ghost_size)
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)
    x += torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))  # Parts differ.
    residual = randn(*shape, seed=2)

    def stock(x, residual):
        z = torch.cat([theirs(part) for part in x.tensor_split(ghosts)])
        return F.relu(z + residual)

    expected = outcome(stock, theirs, x, cotangent, residual)
    assert_close(outcome(ours, ours, x, cotangent, residual), expected, **EXACT)
    assert ours.num_batches_tracked.item() == ghosts
    assert max(len(part) for part in x.tensor_split(ghosts)) <= ghost_size


def test_ghosts_take_their_part_of_the_mask():
    shape = (7, 3, 5)
    mask = random_mask(shape)
    ours, theirs = layer_for(shape, ghost_size=2), layer_for((1, 3), nn)
    x = 3 + randn(*shape)
    parts = x.tensor_split(4), mask.tensor_split(4)
    expected = torch.cat([theirs(p.movedim(1, -1)[m]) for p, m in zip(*parts, strict=True)])
    assert_close(ours(x, mask=mask).movedim(1, -1)[mask], expected, **EXACT)
    assert_close(state(ours), state(theirs), **EXACT)


def test_in_evaluation_there_are_no_ghosts():
    shape = (7, 3)
    ours, plain = layer_for(shape, ghost_size=2).eval(), layer_for(shape).eval()
    x = 3 + randn(*shape)
    assert_close(ours(x), plain(x), **SAME)
    stateless = [layer_for(shape, track_running_stats=False, **o) for o in ({"ghost_size": 2}, {})]
    outputs = [layer.eval()(x) for layer in stateless]
    assert_close(*outputs, **SAME)


def test_ghosts_and_ranks_are_not_combined():
    with pytest.raises(ValueError, match=r"ghost_size parts a batch.*choose one"):
        SyncBatchNorm(3, ghost_size=2)


@pytest.mark.parametrize("ghost_size", [0, -1])
def test_a_ghost_size_below_one_is_refused(ghost_size):
    with pytest.raises(ValueError, match=f"ghost_size must be positive, but got {ghost_size}"):
        BatchNorm1d(3, ghost_size=ghost_size)


# ------------------------------------------------------------------------------ finite_guard


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 4), (30, 3, 20, 20)], ids=str)
def test_a_batch_that_is_not_finite_leaves_the_statistics_untouched(shape, dtype, bad, momentum):
    ours = layer_for(shape, finite_guard=True, dtype=dtype, momentum=momentum)
    theirs = layer_for(shape, nn, dtype=dtype, momentum=momentum)
    good = [3 + randn(*shape, seed=seed, dtype=dtype) for seed in range(3)]
    spoiled = good[0].clone()
    spoiled[1, 1] = bad
    ours(spoiled)  # The first batch too: a cumulative average has none before it.
    assert_close(dict(ours.state_dict()), dict(layer_for(shape, nn, dtype).state_dict()), **SAME)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for number, batch in enumerate(good):
        assert_close(ours(batch), theirs(batch), **tolerance)
        before = state(ours)
        y = ours(spoiled)
        assert not y[:, 1].isfinite().all()
        after = state(ours)
        assert after.pop("num_batches_skipped").item() == number + 2
        del before["num_batches_skipped"]
        assert_close(after, before, **SAME)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **tolerance)


def test_the_count_of_skipped_batches_stays_out_of_the_state_dict():
    layer, stock = BatchNorm1d(3, finite_guard=True), nn.BatchNorm1d(3)
    assert list(layer.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(stock.state_dict(), strict=True)
    assert layer.num_batches_skipped.dtype == torch.int64
    assert copy.deepcopy(layer).num_batches_skipped is not layer.num_batches_skipped


@pytest.mark.parametrize("real", [True, False])
def test_the_guard_looks_at_what_is_real_alone(real):
    layer, x = layer_for((8, 3), finite_guard=True), 3 + randn(8, 3)
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = real
    x[2] = torch.nan
    layer(x, mask=mask)
    assert layer.num_batches_skipped.item() == real
    assert layer.num_batches_tracked.item() == 1 - real
    assert layer.running_mean.isfinite().all()


def test_the_guard_skips_the_ghosts_that_are_spoiled_alone():
    layer, x = layer_for((8, 3), finite_guard=True, ghost_size=2), 3 + randn(8, 3)
    x[5] = torch.nan
    y = layer(x)
    assert (layer.num_batches_skipped.item(), layer.num_batches_tracked.item()) == (1, 3)
    assert y.isfinite().all(1).tolist() == [True] * 4 + [False] * 2 + [True] * 2


# ------------------------------------------------------------------------------- update_once


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (30, 3, 20, 20)], ids=str)
def test_checkpointing_moves_the_statistics_once(shape, options, use_reentrant):
    once, plain, twice = (layer_for(shape, **options, **o) for o in ({"update_once": True}, {}, {}))
    x, cotangent = 3 + randn(*shape), randn(*shape, seed=1)

    def checkpointed(layer):
        return lambda x, _: checkpoint(layer, x, use_reentrant=use_reentrant)

    expected = outcome(lambda x, _: plain(x), plain, x, cotangent)
    for count in (1, 2):
        assert_close(outcome(checkpointed(once), once, x, cotangent), expected, **EXACT)
        assert once.num_batches_tracked.item() == count
        expected = outcome(lambda x, _: plain(x), plain, x, cotangent)
    outcome(checkpointed(twice), twice, x, cotangent)
    if not options:  # With others, torch stops repeating before it comes to the statistics.
        assert twice.num_batches_tracked.item() == 2


# ------------------------------------------------------------------------ float32_statistics


@pytest.mark.parametrize(
    "narrowed",
    [
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.to(torch.float16),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.to("cpu", torch.bfloat16),
        lambda layer: nn.Sequential(layer).bfloat16()[0],
        lambda layer: layer.bfloat16().half(),
    ],
)
def test_running_statistics_stay_in_float32_bit_for_bit(narrowed):
    layer = layer_for((6, 3), dtype=torch.float32, float32_statistics=True)
    layer(3 + randn(6, 3, dtype=torch.float32))
    before = state(layer)
    layer = narrowed(layer)
    assert layer.weight.dtype == layer.bias.dtype != torch.float32
    assert_close(state(layer), before, **SAME)
    assert layer.float().weight.dtype == torch.float32
    assert_close(state(layer), before, **SAME)
    assert layer.double().running_mean.dtype == torch.float64


def test_without_the_option_running_statistics_are_narrowed_as_in_torch():
    assert layer_for((6, 3), dtype=torch.float32).bfloat16().running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constructor", [BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm])
def test_a_layer_made_in_half_precision_keeps_statistics_in_float32(constructor, dtype):
    layer = constructor(3, dtype=dtype, float32_statistics=True)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 3), (30, 3, 20, 20)], ids=str)
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}, {"momentum": None}], ids=str)
def test_half_precision_trains_with_statistics_in_float32(options, shape, dtype):
    layer = layer_for(shape, dtype=torch.float32, float32_statistics=True, **options).to(dtype)
    full = layer_for(shape, nn, dtype=torch.float32, momentum=options.get("momentum", 0.1))
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.copy_(parameter.to(dtype))
    x = (3 + randn(*shape)).to(dtype)
    seen = outcome(layer, layer, x, randn(*shape, seed=1).to(dtype))
    expected = outcome(
        lambda x, _: full(x), full, x.float(), randn(*shape, seed=1).to(dtype).float()
    )
    half = {"rtol": 2**-6, "atol": 2**-6}
    assert seen["output"].dtype == seen["grads"][0].dtype == layer.weight.grad.dtype == dtype
    assert_close(seen["output"].float(), expected["output"], **half)
    assert_close(seen["grads"][0].float(), expected["grads"][0], **half)
    buffers = {name: seen["buffers"][name] for name in expected["buffers"]}
    assert_close(buffers, expected["buffers"], rtol=1e-5, atol=1e-5)
    evaluated = layer.eval()(x)
    assert evaluated.dtype == dtype
    assert_close(evaluated.float(), full.eval()(x.float()), **half)


def test_statistics_in_float32_move_to_the_device_of_the_layer():
    layer = BatchNorm1d(3, float32_statistics=True).to("meta", torch.bfloat16)
    assert layer.running_mean.is_meta
    assert layer.running_mean.dtype == torch.float32
    assert layer.to_empty(device="cpu").running_var.dtype == torch.float32


def test_a_layer_without_statistics_has_none_to_keep():
    layer = BatchNorm1d(3, track_running_stats=False, float32_statistics=True).bfloat16()
    assert layer.running_mean is None
    assert layer(randn(6, 3).bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------------------- momentum None


@each_shape
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}], ids=str)
def test_a_cumulative_average_is_the_mean_over_batches(options, shape):
    layer = layer_for(shape, momentum=None, **options)
    layer.running_mean.fill_(50)  # The first batch weighs 1: nothing of the start remains.
    batches = [seed + randn(*shape, seed=seed) for seed in range(7)]
    for batch in batches:
        layer(batch)
    over = [0, *range(2, len(shape))]
    assert_close(layer.running_mean, torch.stack([b.mean(over) for b in batches]).mean(0), **EXACT)
    assert_close(layer.running_var, torch.stack([b.var(over) for b in batches]).mean(0), **EXACT)


def test_a_cumulative_average_over_masked_batches_leaves_out_those_without_values():
    layer = layer_for((8, 3), momentum=None)
    batches = [seed + randn(8, 3, seed=seed) for seed in range(4)]
    masks = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    masks[[0, 2]] = False
    for batch, mask in zip(batches, masks, strict=True):
        layer(batch, mask=mask)
    means = torch.stack([batches[i][masks[i]].mean(0) for i in (1, 3)])
    assert_close(layer.running_mean, means.mean(0), **EXACT)
    assert layer.num_batches_tracked.item() == 2


# --------------------------------------------------------------------------------- the rest


def spatial_of(constructor):
    return [2] * {"1": 0, "2": 2, "3": 3}[constructor.__name__[-2]]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_lazy_layers_take_every_option(momentum, dimensions):
    options = {
        "eps": 1e-3,
        "momentum": momentum,
        "activation": "leaky_relu",
        "negative_slope": 0.2,
        "ghost_size": 4,
        "finite_guard": True,
        "update_once": True,
        "float32_statistics": True,
    }
    lazy = getattr(normlab, f"LazyBatchNorm{dimensions}d")(**options)
    eager = getattr(normlab, f"BatchNorm{dimensions}d")(3, **options)
    x = randn(8, 3, *spatial_of(type(eager)), dtype=torch.float32)
    assert_close(lazy(x), eager(x), **SAME)
    assert type(lazy) is type(eager)
    assert repr(lazy) == repr(eager)
    assert_close(state(lazy), state(eager), **SAME)
    assert_close(lazy.bfloat16().running_mean, eager.running_mean, **SAME)


def test_a_lazy_layer_may_be_narrowed_before_it_knows_its_channels():
    stock = nn.LazyBatchNorm1d().half()
    layer = LazyBatchNorm1d(float32_statistics=True).half()
    for each in (stock, layer):
        each(randn(6, 3).half())
    assert layer.weight.dtype == stock.weight.dtype == torch.float16
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("names", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
@pytest.mark.parametrize("with_mask", [True, False])
def test_every_two_options_go_together(with_mask, names):
    layer = BatchNorm2d(3, **{name: OPTIONS[name] for name in names})
    shape = (8, 3, 2, 2)
    x = (3 + randn(*shape, dtype=torch.float32)).requires_grad_()
    mask = torch.ones(8, *shape[2:], dtype=torch.bool)
    mask[0] = False
    call = partial(layer, residual=torch.ones(shape), mask=mask if with_mask else None)
    y = call(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    if layer.track_running_stats:
        assert layer.num_batches_tracked.item() == (3 if layer.ghost_size else 1)
        assert (layer.running_mean != 0).all()
    before = state(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert_close(twin.eval()(x), layer.eval()(x), **SAME)
    assert_close(state(layer), before, **SAME)


@each_layer
def test_a_layer_without_options_does_nothing_more_than_a_plain_one(constructor, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a plain layer took the way of the options")

    layer = constructor(3)
    stock = getattr(nn, constructor.__name__)(3)
    x = randn(4, 3, *spatial_of(constructor), dtype=torch.float32)
    monkeypatch.setattr(modules, "special_forward", forbidden)
    assert_close(layer(x), stock(x))
    layer.eval()(x)
    assert layer.num_batches_skipped is None
    assert_close(state(layer), state(stock))
    assert list(layer.state_dict()) == list(stock.state_dict())
    assert repr(layer) == repr(stock)
    with pytest.raises(AssertionError, match="took the way of the options"):
        constructor(3, finite_guard=True)(x)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"ghost_size": 8}, "ghost_size=8"),
        ({"finite_guard": True}, "finite_guard=True"),
        ({"update_once": True}, "update_once=True"),
        ({"float32_statistics": True}, "float32_statistics=True"),
        ({"activation": "leaky_relu", "negative_slope": 0.2}, "negative_slope=0.2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("constructor", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_the_options_that_are_on_are_shown_and_no_other(constructor, option, shown):
    plain = repr(constructor(3)).removesuffix(")")
    text = repr(constructor(3, **option))
    assert text.startswith(plain)
    assert shown in text
    assert text.count("=") == plain.count("=") + len(option)


ERRORS = {
    "another number of channels": ({}, (4, 5), {}, RuntimeError),
    "a single value": ({}, (1, 3), {}, ValueError),
    "another rank": ({}, (4, 3, 2, 2), {}, ValueError),
    "another residual": ({}, (4, 3), {"residual": torch.ones(3)}, RuntimeError),
    "another mask": ({}, (4, 3), {"mask": torch.ones(3, dtype=torch.bool)}, RuntimeError),
    "another mask of ghosts": (
        {"ghost_size": 2},
        (4, 3),
        {"mask": torch.ones(3, dtype=torch.bool)},
        RuntimeError,
    ),
    "guarded, another number of channels": ({"finite_guard": True}, (4, 5), {}, RuntimeError),
    "guarded, one channel": ({"finite_guard": True, "affine": False}, (4, 1), {}, RuntimeError),
    "masked, one channel": ({}, (4, 1), {"mask": torch.ones(4, dtype=torch.bool)}, RuntimeError),
    "guarded, another residual": (
        {"finite_guard": True},
        (4, 3),
        {"residual": torch.ones(3)},
        RuntimeError,
    ),
    "masked, another residual": (
        {},
        (4, 3),
        {"residual": torch.ones(3), "mask": torch.ones(4, dtype=torch.bool)},
        RuntimeError,
    ),
}


@pytest.mark.parametrize("name", ["", "stem.norm"])
@pytest.mark.parametrize(("options", "shape", "keywords", "error"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_layer_and_the_shape(options, shape, keywords, error, name):
    layer = BatchNorm1d(3, **options)
    layer.name = name
    with pytest.raises(error) as raised:
        layer(torch.ones(shape), **keywords)
    message = str(raised.value)
    assert "BatchNorm1d(3)" in message
    assert str(shape) in message
    assert ("'stem.norm'" in message) == bool(name)
