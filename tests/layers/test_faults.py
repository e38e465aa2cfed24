"""What bites people with torch's layer: first that it does, then that it does not with normlab's.

Numbers in the names of sections are those of the list of faults in the design notes; each fault has
the threads in which it was reported. Those of synchronized layers are in `test_sync.py`.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normlab
from normlab import BatchNorm1d, BatchNorm2d, BatchNorm3d

SAME = {"rtol": 0, "atol": 0}
# The first is small enough for torch's kernels to do the work, the second is not.
SIZES = [(8, 3), (11000, 3)]

each_size = pytest.mark.parametrize("shape", SIZES, ids=str)
each_momentum = pytest.mark.parametrize("momentum", [0.1, None])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def statistics(layer):
    return {name: buffer.clone() for name, buffer in layer.state_dict().items()}


# ------------------------------- 2: "Expected more than 1 value per channel" (mmsegmentation#272)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (BatchNorm1d, nn.BatchNorm1d, (1, 5)),
        (BatchNorm2d, nn.BatchNorm2d, (1, 5, 1, 1)),
        (BatchNorm3d, nn.BatchNorm3d, (1, 5, 1, 1, 1)),
    ],
)
def test_a_single_value_is_refused_with_the_layer_and_what_to_do(ours, theirs, shape):
    layer, stock = ours(5), theirs(5)
    layer.name = "head.norm"
    with pytest.raises(ValueError, match="more than 1 value per channel when training") as refused:
        stock(torch.ones(shape))
    assert not any(word in str(refused.value) for word in ("Norm", "eval", "drop_last"))
    with pytest.raises(ValueError, match="more than 1 value per channel when training") as refused:
        layer(torch.ones(shape))
    for word in (f"{ours.__name__}(5)", "'head.norm'", str(shape), "eval()", "drop_last=True"):
        assert word in str(refused.value)
    assert_close(statistics(layer), statistics(stock), **SAME)


# ------------ 3: checkpointing updates the statistics twice (pytorch#96136, pytorch#62471)


@each_size
@each_momentum
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_moves_the_statistics_once(use_reentrant, momentum, shape):
    def step(layer):
        x = (3 + randn(*shape)).requires_grad_()
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        return x.grad

    options = {"momentum": momentum}
    layer, stock = BatchNorm1d(3, update_once=True, **options), nn.BatchNorm1d(3, **options)
    plain = nn.BatchNorm1d(3, **options)
    plain(3 + randn(*shape))
    grads = [step(each) for each in (layer, stock)]
    assert stock.num_batches_tracked.item() == 2
    assert momentum is None or (stock.running_mean > 1.5 * plain.running_mean).all()
    assert_close(statistics(layer), statistics(plain))
    assert_close(*grads, rtol=1e-3, atol=1e-3)


# ------------ 4: one NaN ruins the running statistics for good (pytorch#88474, pytorch#115500)


@each_size
@each_momentum
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_batch_does_not_ruin_evaluation(bad, momentum, shape):
    batches = [3 + randn(*shape, seed=seed) for seed in range(3)]
    batches[1][4, 1] = bad
    stock, layer = nn.BatchNorm1d(3, momentum=momentum), BatchNorm1d(3, momentum=momentum)
    guarded = BatchNorm1d(3, momentum=momentum, finite_guard=True)
    clean = nn.BatchNorm1d(3, momentum=momentum)
    for number, batch in enumerate(batches):
        for each in (stock, layer, guarded):
            each(batch)
        if number != 1:
            clean(batch)
    good = 3 + randn(*shape, seed=9)
    for each in (stock, layer):  # Without the option a drop-in does as torch does.
        assert each.eval()(good)[:, 1].isnan().all()
    assert_close(guarded.eval()(good), clean.eval()(good), rtol=1e-4, atol=1e-4)
    assert_close(statistics(guarded), statistics(clean), rtol=1e-5, atol=1e-5)
    assert guarded.num_batches_skipped.item() == 1


# ------------------------- 6: padding pollutes the statistics (pytorch#70529, pytorch#25910)


@pytest.mark.parametrize("given", ["mask", "lengths"])
@pytest.mark.parametrize("shape", [(4, 3, 10), (64, 3, 300)], ids=str)
def test_padding_leaves_no_trace(shape, given):
    lengths = torch.arange(1, shape[0] + 1)
    mask = torch.arange(shape[-1]) < lengths.view(-1, 1)
    sequences = torch.where(mask.unsqueeze(1), 5 + randn(*shape), 0)
    more = torch.nn.functional.pad(sequences, (0, 7))
    more_mask = torch.nn.functional.pad(mask, (0, 7))

    def means(constructor, **keywords):
        layers = [constructor(3, momentum=1.0) for _ in range(2)]
        layers[0](sequences, **keywords)
        layers[1](more, **(keywords and {given: more_mask if given == "mask" else lengths}))
        return [layer.running_mean for layer in layers]

    stock = means(nn.BatchNorm1d)
    assert (stock[0] < 4).all()
    assert (stock[1] < 0.99 * stock[0]).all()
    true_mean = sequences.movedim(1, -1)[mask].mean(0)
    for mean in means(BatchNorm1d, **{given: {"mask": mask, "lengths": lengths}[given]}):
        assert_close(mean, true_mean, rtol=1e-5, atol=1e-5)


# ----- 8: buffers that are changed in place before the backward pass (pytorch#22095, #110363)


@each_size
@each_momentum
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}, {"activation": "relu"}], ids=str)
def test_the_backward_pass_bears_buffers_that_were_changed_in_place(options, momentum, shape):
    def step(layer):
        x = (3 + randn(*shape)).requires_grad_()
        y = layer(x)
        # As data-parallel training does on every rank but the first, in its next forward pass.
        layer.running_mean.copy_(torch.ones(3))
        layer.running_var.copy_(torch.ones(3))
        (y * randn(*shape, seed=1)).sum().backward()
        return x.grad

    if momentum is not None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(nn.BatchNorm1d(3))
    x = (3 + randn(*shape)).requires_grad_()
    follow = torch.relu if "activation" in options else torch.Tensor.clone
    y = follow(nn.BatchNorm1d(3)(x))
    (y * randn(*shape, seed=1)).sum().backward()
    layer = BatchNorm1d(3, momentum=momentum, **options)
    assert_close(step(layer), x.grad, rtol=1e-4, atol=1e-4)


# ------------- 13: vmap, and compilation in full graph with momentum=None (pytorch#194504)


def compiled(layer):
    # A backend that generates no code: what fails is the tracing.
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@each_size
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}, {"activation": "relu"}], ids=str)
def test_a_cumulative_average_can_be_compiled_in_full_graph(options, shape):
    torch._dynamo.reset()
    if not options:
        with pytest.raises(Exception, match="data-dependent"):
            compiled(nn.BatchNorm1d(3, momentum=None))(randn(*shape))
        torch._dynamo.reset()
    layer, plain = (BatchNorm1d(3, momentum=None, **options) for _ in range(2))
    fast = compiled(layer)
    for seed in range(3):
        x = seed + randn(*shape, seed=seed)
        assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert_close(statistics(layer), statistics(plain), rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked.item() == 3


@each_size
@each_momentum
def test_layers_stacked_by_vmap_do_what_each_does_alone(momentum, shape):
    x = 3 + randn(4, *shape)

    def stacked(constructor):
        layers = [constructor(3, momentum=momentum) for _ in range(4)]
        for number, layer in enumerate(layers):
            nn.init.constant_(layer.weight, 1 + number)
        parameters, buffers = stack_module_state(layers)

        def call(parameters, buffers, x):
            return functional_call(layers[0], (parameters, buffers), (x,))

        return vmap(call)(parameters, buffers, x), buffers

    if momentum is None:
        with pytest.raises(RuntimeError, match="vmap: It looks like you're calling"):
            stacked(nn.BatchNorm1d)
    outputs, buffers = stacked(BatchNorm1d)
    for number in range(4):
        alone = nn.BatchNorm1d(3, momentum=momentum)
        nn.init.constant_(alone.weight, 1 + number)
        assert_close(outputs[number], alone(x[number]), rtol=1e-4, atol=1e-4)
        mine = {name: buffer[number] for name, buffer in buffers.items()}
        assert_close(mine, dict(alone.named_buffers()), rtol=1e-5, atol=1e-5)


# ------------------------------------- 15: digits lost to a large mean (pytorch#5410), bfloat16


def error(layer, x):
    """The largest error of the output against float64, in standard deviations."""
    double = x.double()
    over = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(double, over, correction=0, keepdim=True)
    return (layer(x).double() - (double - mean) / (var + layer.eps).sqrt()).abs().max().item()


@pytest.mark.parametrize("shape", [(11000, 3), (256, 3, 50), (32, 3, 20, 20)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("options", [{}, {"finite_guard": True}, {"momentum": None}], ids=str)
def test_a_large_mean_costs_no_digits(options, sign, shape):
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    x = (sign * 1e4 + 1e-2 * randn(*shape, dtype=torch.float64)).float()
    assert error(getattr(nn, name)(3, eps=1e-10), x) > 5e-3
    assert error(getattr(normlab, name)(3, eps=1e-10, **options), x) < 1e-5


def test_a_large_mean_costs_no_digits_of_the_running_variance():
    x = (1e4 + 1e-2 * randn(11000, 3, dtype=torch.float64)).float()
    naive = x.square().mean(0) - x.mean(0).square()
    assert ((naive / x.double().var(0) - 1).abs() > 0.9).all()
    layer = BatchNorm1d(3, momentum=1.0)
    layer(x)
    assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-6, atol=0)


def test_statistics_in_float32_do_not_stall_where_those_in_bfloat16_do():
    stock = nn.BatchNorm1d(3, momentum=0.001).bfloat16()
    layer = BatchNorm1d(3, momentum=0.001, float32_statistics=True).bfloat16()
    exact = nn.BatchNorm1d(3, momentum=0.001)
    x = (2 + randn(8, 3)).bfloat16()
    for each in (stock, layer, exact):
        each.running_mean.fill_(1)
    for _ in range(100):
        for each in (stock, layer):
            each(x)
        exact(x.float())
    assert (stock.running_mean == 1).all()
    assert (exact.running_mean > 1.05).all()
    assert_close(layer.running_mean, exact.running_mean, rtol=1e-4, atol=0)
    assert_close(layer.running_var, exact.running_var, rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------- bad input


MISTAKES = {
    "rank": (ValueError, {}, torch.ones(3), ("2D or 3D", "1D", "(3,)")),
    "rank of images": (
        ValueError,
        {},
        torch.ones(2, 3, 4, 4),
        ("2D or 3D", "4D", "(2, 3, 4, 4)"),
    ),
    "channels": (
        RuntimeError,
        {},
        torch.ones(2, 5),
        ("should contain 5 elements", "(2, 5)", "not 3"),
    ),
    "one channel": (
        RuntimeError,
        {},
        torch.ones(2, 1),
        ("should contain 1 elements", "(2, 1)", "not 3"),
    ),
    "eps": (ValueError, {"eps": -1.0}, torch.ones(2, 3), ("eps must be", "-1.0")),
    "integers": (
        NotImplementedError,
        {},
        torch.ones(2, 3, dtype=torch.int64),
        ("floating", "int64", ".float()"),
    ),
    "booleans": (
        NotImplementedError,
        {},
        torch.ones(2, 3, dtype=torch.bool),
        ("floating", "bool", ".float()"),
    ),
    "another device": (
        RuntimeError,
        {},
        torch.ones(2, 3, device="meta"),
        ("device", "cpu", "meta", ".to()"),
    ),
    "a layer elsewhere": (
        RuntimeError,
        {"device": "meta"},
        torch.ones(2, 3),
        ("device", "cpu", "meta", ".to()"),
    ),
}
WAYS = {
    "plain": ({}, False),
    "finite_guard": ({"finite_guard": True}, False),
    "ghost_size": ({"ghost_size": 4}, False),
    "update_once": ({"update_once": True}, False),
    "mask": ({}, True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("way", "masked"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("error", "options", "x", "words"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input_raises_what_torch_raises_and_says_what_to_do(
    error, options, x, words, way, masked, training
):
    stock = nn.BatchNorm1d(3, **options).train(training)
    with pytest.raises(error) as theirs:
        stock(x)
    layer = BatchNorm1d(3, **options, **way).train(training)
    mask = torch.ones(x.shape[:1] + x.shape[2:], dtype=torch.bool) if masked else None
    with pytest.raises(error) as ours:
        layer(x, mask=mask)
    assert type(ours.value) is type(theirs.value) is error
    for word in (*words, "BatchNorm1d(3)"):
        assert word in str(ours.value)
