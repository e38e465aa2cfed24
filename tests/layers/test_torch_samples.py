import pickle
import warnings
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.testing import assert_close

from normlab.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    batch_norm,
    fused,
    native,
)

OURS = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
EAGER = {nn.BatchNorm1d: 8, nn.BatchNorm2d: 7, nn.BatchNorm3d: 7}
"""How many samples torch has; the last of each needs a torch whose layers know `bias=False`."""
LAZY = {
    nn.BatchNorm1d: nn.LazyBatchNorm1d,
    nn.BatchNorm2d: nn.LazyBatchNorm2d,
    nn.BatchNorm3d: nn.LazyBatchNorm3d,
}
FUNCTIONAL = 12

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 in float32": (torch.bfloat16, torch.float32),
}
"""Of the input, and of what is kept for a channel."""
ROUNDINGS = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1}
"""How many units of the last place a result may be off: one rounding, after sums in float32."""

LAYOUTS = {
    "as it is": lambda x: x,
    "not contiguous": lambda x: x.unsqueeze(-1).repeat_interleave(2, -1)[..., 1],
    "channels last": lambda x: x if x.ndim < 2 else x.movedim(1, -1).contiguous().movedim(-1, 1),
}

each_sample = pytest.mark.parametrize(
    ("theirs", "index"),
    [(layer, index) for layer, count in EAGER.items() for index in range(count)],
)
each_functional_sample = pytest.mark.parametrize("index", range(FUNCTIONAL))
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_dtype = pytest.mark.parametrize("dtypes", DTYPES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
# torch scripts decompositions of its own for derivatives forward over reverse.
ignore_scripting = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(autouse=True)
def _single_thread():
    """With samples this small a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def internal(name):
    """Import a part of torch's own tests, which asks for packages that torch does not install."""
    frozen = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(f"torch.testing._internal.{name}", exc_type=ImportError)
    setattr(torch.backends, frozen, before)  # They forbid the whole process to set flags.
    return module


@lru_cache
def module_samples(theirs):
    (info,) = (i for i in internal("common_modules").module_db if i.module_cls is theirs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
        )


@lru_cache
def functional_samples():
    operators = internal("common_methods_invocations").op_db
    (info,) = (
        o for o in operators if (o.name, o.variant_test_name) == ("nn.functional.batch_norm", "")
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return list(info.sample_inputs("cpu", torch.float64))


def module_sample(theirs, index):
    """The arguments of the constructor, by position and by name, and the input."""
    samples = module_samples(theirs)
    if index >= len(samples):
        pytest.skip(f"torch {torch.__version__} has fewer samples")
    sample = samples[index]
    (input,), constructor = sample.forward_input.args, sample.constructor_input
    return constructor.args, constructor.kwargs, input


def functional_sample(index):
    """The tensors, and the options."""
    sample = functional_samples()[index]
    tensors = (sample.input, *sample.args)
    return [tensor if tensor is None else tensor.clone() for tensor in tensors], sample.kwargs


def pair(theirs, index, dtype=torch.float64, training=True, lazy=False, device="cpu"):
    """Torch's layer of a sample, and ours with the same state."""
    arguments, options, input = module_sample(theirs, index)
    if lazy:
        theirs, arguments = LAZY[theirs], arguments[1:]
    layers = [
        kind(*arguments, **options, dtype=dtype, device=device) for kind in (theirs, OURS[theirs])
    ]
    if not lazy:
        generator = torch.Generator().manual_seed(1)
        for tensor in (*layers[0].parameters(), *layers[0].buffers()):
            if tensor.is_floating_point() and device == "cpu":
                nn.init.uniform_(tensor, 0.5, 2, generator=generator)
        layers[1].load_state_dict(layers[0].state_dict())
    return *(layer.train(training) for layer in layers), input


def cotangent(x):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def two_steps(layer, x, exact=False):
    """All that can be seen of two steps: a cumulative average tells them apart."""
    layer = layer.double() if exact else layer
    seen = {}
    for step, input in enumerate([x, 2 * x + 1]):
        grad = cotangent(x)
        # Detached, so that a layout that is not dense stays what it is.
        input = (input.double() if exact else input.detach()).requires_grad_()
        output = layer(input)
        output.backward(grad.to(output.dtype))
        seen[f"output {step}"], seen[f"input's gradient {step}"] = output.detach(), input.grad
        for name, parameter in layer.named_parameters():
            seen[f"{name}'s gradient {step}"], parameter.grad = parameter.grad, None
    return seen | {name: tensor.clone() for name, tensor in layer.named_buffers()}


def assert_seen_alike(actual, expected):
    """Compare by what the dtype of each can hold; `expected` may be more exact."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        dtype, reference = value.dtype, expected[name]
        off = ROUNDINGS[dtype] * torch.finfo(dtype).eps if dtype.is_floating_point else 0
        if name.startswith("running"):
            off *= 2  # Moved twice.
        largest = max(1, reference.abs().max().item()) if reference.numel() else 1
        assert_close(
            value,
            reference.to(dtype),
            rtol=off,
            atol=off * largest if dtype != torch.bfloat16 else off / 4,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_torch_has_no_more_samples_than_are_run():
    for layer, count in EAGER.items():
        assert len(module_samples(layer)) <= count
    assert len(functional_samples()) == FUNCTIONAL


@pytest.mark.skipif(not native.BUILT, reason="there are no kernels")
def test_samples_reach_our_kernels_where_they_are_asked_to(monkeypatch):
    dtypes = []
    call = native.forward
    monkeypatch.setattr(
        native, "forward", lambda x, *rest: dtypes.append(x.dtype) or call(x, *rest)
    )
    monkeypatch.setattr(fused, "SMALL", 0)
    for theirs in EAGER:
        _, layer, x = pair(theirs, 0)
        two_steps(layer, x)
    assert dtypes == [torch.float64] * 6


# ----------------------------------------------------------------------------- layers


@each_layout
@each_dtype
@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
def test_a_layer_leaves_behind_what_torch_does(theirs, index, training, dtypes, layout):
    of_values, of_channels = DTYPES[dtypes]
    stock, layer, x = pair(theirs, index, of_channels, training)
    x = LAYOUTS[layout](x.to(of_values))
    actual = two_steps(layer, x)
    assert actual["output 0"].dtype == actual["input's gradient 0"].dtype == of_values
    # In bfloat16 torch rounds more often than once.
    assert_seen_alike(actual, two_steps(stock, x, exact=of_values == torch.bfloat16))


@each_layout
@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
def test_an_output_lies_in_memory_as_torchs_does(theirs, index, training, layout):
    stock, layer, x = pair(theirs, index, torch.float32, training)
    x = LAYOUTS[layout](x.float())
    assert layer(x).stride() == stock(x).stride()


@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
def test_a_lazy_layer_becomes_what_torchs_becomes(theirs, index, training):
    stock, layer, x = pair(theirs, index, torch.float32, training, lazy=True)
    assert repr(layer) == repr(stock)
    assert layer.has_uninitialized_params() == stock.has_uninitialized_params()
    assert_seen_alike(two_steps(layer, x.float()), two_steps(stock, x.float()))
    assert type(layer) is OURS[theirs]
    assert repr(layer) == repr(stock)
    assert layer.state_dict().keys() == stock.state_dict().keys()


@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
def test_a_pickled_layer_does_as_before(theirs, index, training):
    stock, layer, x = pair(theirs, index, torch.float32, training)
    again = pickle.loads(pickle.dumps(layer))
    assert repr(again) == repr(layer) == repr(stock)
    assert_seen_alike(two_steps(again, x.float()), two_steps(stock, x.float()))


@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
def test_a_layer_on_the_meta_device_says_what_torch_says(theirs, index, training):
    stock, layer, x = pair(theirs, index, torch.float32, training, device="meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    x = x.to("meta", torch.float32)
    if stock.momentum is None and training:  # torch asks a meta tensor for a number.
        stock.momentum = 0.1
    actual, expected = layer(x), stock(x)
    assert actual.is_meta
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@each_sample
def test_factory_arguments_reach_what_they_reach_in_torch(theirs, index, dtype, lazy):
    stock, layer, _ = pair(theirs, index, dtype, lazy=lazy, device="meta")
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):
        actual = {name: (tensor.dtype, tensor.device) for name, tensor in of(layer)}
        assert actual == {name: (tensor.dtype, tensor.device) for name, tensor in of(stock)}


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("theirs", EAGER)
@pytest.mark.usefixtures("kernels")
def test_what_torch_refuses_is_refused(theirs, index):
    (info,) = (i for i in internal("common_modules").module_db if i.module_cls is theirs)
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    constructor = errors[index].module_error_input.constructor_input
    layer = OURS[theirs](*constructor.args, **constructor.kwargs)
    with pytest.raises(errors[index].error_type, match=errors[index].error_regex):
        layer(*errors[index].module_error_input.forward_input.args)


@each_mode
@each_sample
@pytest.mark.usefixtures("kernels")
@ignore_scripting
def test_derivatives_of_a_layer(theirs, index, training):
    _, layer, x = pair(theirs, index, torch.float64, training)
    names, parameters = [*dict(layer.named_parameters())], [*layer.parameters()]
    buffers = dict(layer.named_buffers())

    def call(x, *parameters):
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(layer, dict(zip(names, parameters, strict=True)) | fresh, x)

    assert_derivatives(call, [x.clone().requires_grad_(), *parameters])


def assert_derivatives(call, leaves):
    """Check first and second derivatives, forward and reverse, one by one and vectorized."""
    options = {"fast_mode": True, "check_batched_grad": True}  # As torch checks its own.
    assert gradcheck(
        call, leaves, check_forward_ad=True, check_batched_forward_grad=True, **options
    )
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, **options)


# ----------------------------------------------------------------------------- function


def function_step(function, index, dtypes, layout="as it is", exact=False):
    """All that can be seen of a call on a sample, whose tensors nobody else has."""
    of_values, of_channels = dtypes
    (x, *per_channel), options = functional_sample(index)
    x = LAYOUTS[layout](x.to(of_values))
    grad = cotangent(x)
    per_channel = [tensor if tensor is None else tensor.to(of_channels) for tensor in per_channel]
    if exact:
        x, *per_channel = (
            tensor if tensor is None else tensor.double() for tensor in (x, *per_channel)
        )
    mean, var, weight, bias = per_channel
    leaves = {"input": x, "weight": weight, "bias": bias}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    output = function(x, mean, var, weight, bias, **options)
    output.backward(grad.to(output.dtype))
    seen = {f"{name}'s gradient": leaf.grad for name, leaf in leaves.items()}
    seen |= {"running mean": mean, "running var": var, "output": output.detach()}
    return {name: tensor for name, tensor in seen.items() if tensor is not None}


@each_layout
@each_dtype
@each_functional_sample
@pytest.mark.usefixtures("kernels")
def test_a_call_leaves_behind_what_torch_does(index, dtypes, layout):
    dtypes = DTYPES[dtypes]
    if dtypes[0] == torch.bfloat16:  # torch rounds more often than once.
        expected = function_step(F.batch_norm, index, dtypes, layout, exact=True)
    else:
        expected = function_step(F.batch_norm, index, dtypes, layout)
    assert_seen_alike(function_step(batch_norm, index, dtypes, layout), expected)


@each_layout
@each_functional_sample
@pytest.mark.usefixtures("kernels")
def test_the_output_of_a_call_lies_in_memory_as_torchs_does(index, layout):
    (x, *per_channel), options = functional_sample(index)
    x = LAYOUTS[layout](x)
    actual, expected = (f(x, *per_channel, **options) for f in (batch_norm, F.batch_norm))
    assert actual.stride() == expected.stride()


@each_functional_sample
@pytest.mark.usefixtures("kernels")
def test_parameters_and_statistics_need_not_be_contiguous(index):
    tensors, options = functional_sample(index)
    apart = [tensor if tensor is None else LAYOUTS["not contiguous"](tensor) for tensor in tensors]
    actual, expected = batch_norm(*apart, **options), F.batch_norm(*tensors, **options)
    assert_close([actual, *apart], [expected, *tensors])


@each_functional_sample
@pytest.mark.usefixtures("kernels")
def test_a_view_of_negated_values_is_read_as_negated(index):
    tensors, options = functional_sample(index)
    negated = torch._neg_view(-tensors[0])
    actual = batch_norm(negated, *tensors[1:], **options)
    assert_close(actual, F.batch_norm(*functional_sample(index)[0], **options))


@each_functional_sample
@pytest.mark.usefixtures("kernels")
@ignore_scripting
def test_derivatives_of_a_call(index):
    (x, mean, var, *affine), options = functional_sample(index)

    def call(x, *affine):
        fresh = (tensor if tensor is None else tensor.clone() for tensor in (mean, var))
        return batch_norm(x, *fresh, *affine, **options)

    leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in (x, *affine)]
    assert_derivatives(call, leaves)
