import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from normlab.layers import BatchNorm2d, batch_norm, fused, native

SHAPES = {"small": (4, 3, 5, 5), "large": (16, 8, 16, 16)}
"""Below and at what torch's kernel is as fast for."""
FOLLOWED = {"alone": (None, False), "relu": ("relu", False), "added and relu": ("relu", True)}
"""The activation, and whether something is added before it."""

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_follow = pytest.mark.parametrize(("activation", "adds"), FOLLOWED.values(), ids=FOLLOWED)
# torch scripts functions of its own on the way: in inductor, and for forward over reverse.
ignore_scripting = pytest.mark.filterwarnings("ignore:.torch.jit.script")
needs_kernels = pytest.mark.skipif(not native.BUILT, reason="there are no kernels")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def _our_kernels(monkeypatch):
    """Let normlab's kernels do the work of small tensors too."""
    monkeypatch.setattr(fused, "SMALL", 0)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Followed(nn.Module):
    """Torch's layer, with what comes after as steps of their own."""

    def __init__(self, layer, activation):
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x, residual=None):
        z = self.layer(x)
        z = z if residual is None else z + residual
        return F.relu(z) if self.activation == "relu" else z


def pair(channels, training=True, activation=None, **options):
    """Our layer and torch's in one state, which is not that of a new one."""
    ours = BatchNorm2d(channels, activation=activation, **options)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*ours.parameters(), *ours.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2, generator=generator)
    theirs = nn.BatchNorm2d(channels, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(training), Followed(theirs, activation).train(training)


def inputs(shape, adds=False, dtype=torch.float32):
    count = 2 if adds else 1
    return [(1 + randn(*shape, seed=seed, dtype=dtype)).requires_grad_() for seed in range(count)]


def seen(call, layer, tensors, steps=2):
    """All that can be seen of some steps of `call`, which runs `layer`."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = []
    for step in range(steps):
        output = call(*tensors)
        output.backward(randn(*output.shape, seed=10 + step).to(output.dtype))
        outputs.append(output.detach())
    parameters = [*layer.parameters()]
    gradients = [tensor.grad for tensor in (*tensors, *parameters)]
    return {"outputs": outputs, "gradients": gradients, "buffers": [*layer.buffers()]}


def assert_alike(actual, expected):
    """In float32, by sums of up to 4096 values taken in another order."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- compilers


@each_follow
@each_shape
@pytest.mark.parametrize(("training", "momentum"), [(True, 0.1), (True, None), (False, 0.1)])
def test_a_compiled_layer_does_what_torch_does(shape, training, activation, adds, momentum):
    ours, theirs = pair(shape[1], training, activation, momentum=momentum)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = inputs(shape, adds)
    assert_alike(seen(compiled, ours, tensors), seen(theirs, theirs, tensors))


@pytest.mark.parametrize("momentum", [0.1, pytest.param(None, marks=pytest.mark.slow)])
@ignore_scripting
def test_inductor_compiles_training(momentum):
    ours, theirs = pair(8, activation="relu", momentum=momentum)
    tensors = inputs(SHAPES["large"], adds=True)
    compiled = torch.compile(ours, fullgraph=True)
    assert_alike(seen(compiled, ours, tensors), seen(theirs, theirs, tensors))


@pytest.mark.slow
@ignore_scripting
def test_inductor_compiles_a_network_around_the_layers():
    class Network(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
            self.norms = nn.ModuleList([norm(8), norm(8)])

        def forward(self, x):
            return self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))).relu()

    torch.manual_seed(0)
    ours, theirs = Network(BatchNorm2d), Network(nn.BatchNorm2d)
    theirs.load_state_dict(ours.state_dict())
    tensors = [randn(8, 3, 16, 16)]
    compiled = torch.compile(ours, fullgraph=True)
    assert_alike(seen(compiled, ours, tensors), seen(theirs, theirs, tensors))


@needs_kernels
@each_mode
@each_shape
def test_a_compiled_graph_holds_the_operator_whole(shape, training):
    graphs = []

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    aot = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend)
    ours, _ = pair(shape[1], training)
    torch.compile(ours, fullgraph=True, backend=aot)(*inputs(shape)).sum().backward()
    forward, backward = graphs
    assert "normlab.batch_norm.default" in forward
    assert "normlab.batch_norm_backward.default" in backward
    assert not any("rsqrt" in target or "native_batch_norm" in target for target in forward)


@each_mode
def test_one_compilation_serves_every_batch_size(training):
    ours, theirs = pair(8, training, "relu")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for batch in (16, 24, 5):
        x = randn(batch, 8, 16, 16)
        torch._dynamo.mark_dynamic(x, 0)
        assert_alike(compiled(x), theirs(x))
    assert counter.frame_count == 1
    assert_alike([*ours.buffers()], [*theirs.buffers()])


def test_a_compiled_layer_keeps_channels_last():
    ours, theirs = pair(8)
    x = randn(16, 8, 16, 16).to(memory_format=torch.channels_last)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), theirs(x)
    assert actual.stride() == expected.stride()
    assert_alike(actual, expected)


@each_shape
def test_compiled_autograd_runs_the_backward_pass(shape):
    ours, theirs = pair(shape[1])
    tensors = inputs(shape)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        actual = seen(ours, ours, tensors)
    assert_alike(actual, seen(theirs, theirs, tensors))


# ----------------------------------------------------------------------------- graphs


@each_mode
@each_shape
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("inside", [True, False], ids=["in a network", "by itself"])
def test_symbolic_tracing_moves_nothing_and_gives_the_same_layer(shape, training, momentum, inside):
    ours, theirs = pair(shape[1], training, "relu", momentum=momentum)
    before = copy.deepcopy(ours.state_dict())
    traced = torch.fx.symbolic_trace(nn.Sequential(ours) if inside else ours)
    assert_close(ours.state_dict(), before, rtol=0, atol=0)
    tensors = inputs(shape)
    assert_alike(seen(traced, ours, tensors), seen(theirs, theirs, tensors))
    assert_alike([*traced.buffers()], [*theirs.buffers()])


@each_mode
def test_a_traced_network_survives_a_copy_and_a_pickle(training):
    ours, _ = pair(3, training)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    (x,) = inputs(SHAPES["small"])
    again = [copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    expected = ours(x)
    assert_close([module(x) for module in again], [expected] * 2, rtol=0, atol=0)


@each_follow
@each_mode
@each_shape
def test_an_exported_program_needs_no_normlab(shape, training, activation, adds):
    ours, theirs = pair(shape[1], training, activation)
    tensors = [tensor.detach() for tensor in inputs(shape, adds)]
    program = torch.export.export(ours, tuple(tensors))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert calls
    assert {node.target.namespace for node in calls} == {"aten"}
    module = program.module()
    assert_alike(module(*tensors), theirs(*tensors))
    assert_alike([*module.buffers()], [*theirs.buffers()])


def test_an_exported_program_serves_every_batch_size():
    ours, theirs = pair(8, False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (randn(8, 8, 16, 16),), dynamic_shapes=({0: batch},))
    x = randn(32, 8, 16, 16, seed=3)
    assert_alike(program.module()(x), theirs(x))


@each_shape
def test_onnxruntime_runs_what_is_exported(shape, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, theirs = pair(shape[1], False, "relu")
    tensors = tuple(tensor.detach() for tensor in inputs(shape, adds=True))
    path = str(tmp_path / "layer.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter's own.
        torch.onnx.export(ours, tensors, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    (actual,) = session.run(None, feed)
    assert_alike(torch.from_numpy(actual), theirs(*tensors).detach())


@each_mode
@each_shape
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_tracing_gives_the_same_layer(shape, training):
    ours, theirs = pair(shape[1], training)
    (x,) = inputs(shape)
    traced = torch.jit.trace(ours, x.detach(), check_trace=False)
    theirs(x)  # A trace is a run.
    other = randn(*shape, seed=5)
    assert_alike(traced(other), theirs(other))
    assert_alike([*traced.buffers()], [*theirs.buffers()])


@each_mode
@each_shape
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_a_step(shape, training, tracing_mode):
    ours, theirs = pair(shape[1], training, "relu")
    parameters, buffers = dict(ours.named_parameters()), dict(ours.named_buffers())
    before = copy.deepcopy(buffers)

    def step(parameters, buffers, x):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        loss = functional_call(ours, (parameters, buffers), x).square().sum()
        return torch.autograd.grad(loss, [*parameters.values()]), buffers

    (x,) = inputs(shape)
    graph = make_fx(step, tracing_mode=tracing_mode)(parameters, buffers, x)
    gradients, moved = graph(parameters, buffers, x)
    theirs(x).square().sum().backward()
    assert_alike(gradients, [parameter.grad for parameter in theirs.parameters()])
    assert_alike([*moved.values()], [*theirs.buffers()])
    assert_close(buffers, before, rtol=0, atol=0)


# ----------------------------------------------------------------------------- torch.func


def stacked(training, replicas=3, channels=3, activation=None, momentum=0.1):
    """Replicas of different parameters and statistics; theirs one by one, ours as one."""
    pairs = [
        pair(channels, training, activation, momentum=momentum, bias=True) for _ in range(replicas)
    ]
    for seed, (ours, theirs) in enumerate(pairs):
        with torch.no_grad():
            for tensor in (*ours.parameters(), ours.running_mean, ours.running_var):
                tensor += torch.rand(channels, generator=torch.Generator().manual_seed(seed))
        theirs.layer.load_state_dict(ours.state_dict())
    parameters, buffers = stack_module_state([ours for ours, _ in pairs])
    return pairs[0][0], parameters, buffers, [theirs for _, theirs in pairs]


def named_state(theirs, of):
    """What torch's layers hold, stacked as ours are."""
    per_layer = [dict(of(layer.layer)) for layer in theirs]
    return {name: torch.stack([each[name] for each in per_layer]) for name in per_layer[0]}


REPLICA_SHAPES = {"small": (4, 3, 5, 5), "large": (32, 3, 20, 20)}
each_replica_shape = pytest.mark.parametrize("shape", REPLICA_SHAPES.values(), ids=REPLICA_SHAPES)


@each_mode
@each_replica_shape
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "a batch each"])
def test_vmap_trains_replicas_as_torch_trains_each(shape, training, shared, momentum):
    layer, parameters, buffers, theirs = stacked(training, activation="relu", momentum=momentum)
    x = randn(*shape) if shared else randn(3, *shape)
    x.requires_grad_()

    def call(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), x)

    cotangent = randn(3, *shape, seed=4)
    output = vmap(call, in_dims=(0, 0, None if shared else 0))(parameters, buffers, x)
    gradients = torch.autograd.grad(output, [*parameters.values(), x], cotangent)
    theirs_x = x.detach().clone().requires_grad_()
    expected = torch.stack(
        [each(theirs_x if shared else theirs_x[i]) for i, each in enumerate(theirs)]
    )
    expected.backward(cotangent)
    assert_alike(output, expected)
    assert_alike(buffers, named_state(theirs, nn.Module.named_buffers))
    of_parameters = [
        torch.stack([each.layer.get_parameter(name).grad for each in theirs]) for name in parameters
    ]
    assert_alike(gradients, [*of_parameters, theirs_x.grad])


@each_mode
@each_replica_shape
def test_gradients_of_replicas_by_vmap_over_grad(shape, training):
    layer, parameters, buffers, theirs = stacked(training, activation="relu")
    x = randn(3, *shape)

    def loss(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), x).square().sum()

    gradients = vmap(grad(loss))(parameters, buffers, x)
    for each, batch in zip(theirs, x, strict=True):
        each(batch).square().sum().backward()
    for name, gradient in gradients.items():
        assert_close(
            gradient,
            torch.stack([each.layer.get_parameter(name).grad for each in theirs]),
            rtol=1e-4,
            atol=1e-3,
        )
    assert_alike(buffers, named_state(theirs, nn.Module.named_buffers))


@each_mode
@each_replica_shape
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@ignore_scripting
def test_a_compiled_vmap_runs_under_ordinary_autograd(shape, training, backend):
    layer, parameters, buffers, theirs = stacked(training, activation="relu")
    x = randn(3, *shape)

    @partial(torch.compile, fullgraph=True, backend=backend)
    @vmap
    def call(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), x)

    output = call(parameters, buffers, x)
    expected = torch.stack([each(batch) for each, batch in zip(theirs, x, strict=True)])
    assert_alike(output, expected)
    assert_alike(buffers, named_state(theirs, nn.Module.named_buffers))
    cotangent = randn(3, *shape, seed=4)
    gradients = torch.autograd.grad(output, [*parameters.values()], cotangent)
    expected.backward(cotangent)
    of_parameters = [
        torch.stack([each.layer.get_parameter(name).grad for each in theirs]) for name in parameters
    ]
    assert_alike(gradients, of_parameters)


@each_mode
@each_replica_shape
def test_a_compiled_vmap_over_grad_is_right_or_refused(shape, training):
    layer, parameters, buffers, theirs = stacked(training, activation="relu")
    x = randn(3, *shape)

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    @vmap
    @grad
    def gradient(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), x).square().sum()

    gradients = gradient(parameters, buffers, x)
    for each, batch in zip(theirs, x, strict=True):
        each(batch).square().sum().backward()
    for name in parameters:
        assert_close(
            gradients[name],
            torch.stack([each.layer.get_parameter(name).grad for each in theirs]),
            rtol=1e-4,
            atol=1e-3,
        )
    assert_alike(buffers, named_state(theirs, nn.Module.named_buffers))


@each_mode
@pytest.mark.usefixtures("_our_kernels")
@pytest.mark.parametrize(
    ("in_dims", "out_dims"),
    [
        ((0, None, None, None, None), 0),
        ((2, None, None, None, None), 1),
        ((-1, None, None, None, None), -1),
        ((0, 0, 0, 0, 0), 0),
        ((1, 1, 1, 1, 1), 2),
        ((None, 0, None, 0, 0), 0),
        ((0, None, 0, 0, 0), 0),
        ((0, 0, None, 0, 0), 3),
    ],
)
def test_vmap_along_any_dimension_of_any_argument(training, in_dims, out_dims):
    shapes = [(4, 2, 5), (2,), (2,), (2,), (2,)]
    tensors = []
    for seed, (shape, dim) in enumerate(zip(shapes, in_dims, strict=True)):
        tensor = randn(3, *shape, seed=seed, dtype=torch.float64).square() + 0.1
        tensors.append(tensor[0] if dim is None else tensor.movedim(0, dim))

    def run(function):
        leaves = [tensor.clone() for tensor in tensors]
        return (
            vmap(
                lambda x, w, b, m, v: function(x, m, v, w, b, training=training),
                in_dims=in_dims,
                out_dims=out_dims,
            )(*leaves),
            leaves,
        )

    if training and in_dims[3] is None:  # Statistics of one cannot be moved by each of many.
        with pytest.raises((RuntimeError, ValueError), match=r"vmap|batched"):
            run(batch_norm)
        return
    actual, expected = run(batch_norm), run(F.batch_norm)
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_our_kernels")
@pytest.mark.parametrize("adds", [False, True])
def test_nested_vmap(adds):
    x, residual = randn(2, 3, 4, 2, 5, dtype=torch.float64), randn(2, 4, 2, 5, dtype=torch.float64)
    weight = randn(3, 2, seed=2, dtype=torch.float64)

    def call(x, weight, residual):
        added = residual if adds else None
        return batch_norm(x, None, None, weight, None, True, activation="relu", residual=added)

    actual = vmap(vmap(call, in_dims=(0, 0, None)), in_dims=(0, None, 0))(x, weight, residual)
    for i in range(2):
        for j in range(3):
            z = F.batch_norm(x[i, j], None, None, weight[j], None, True)
            z = z + residual[i] if adds else z
            assert_close(actual[i, j], F.relu(z), rtol=1e-10, atol=1e-10)


@each_mode
@pytest.mark.usefixtures("_our_kernels")
@ignore_scripting
def test_vectorized_jacobians_of_ordinary_autograd(training):
    x = randn(3, 2, 2, dtype=torch.float64)
    statistics = (None, None) if training else (x[0, :, 0], x[1, :, 1].square())
    call, stock = (
        partial(lambda f, x: f(x, *statistics, training=training), f)
        for f in (batch_norm, F.batch_norm)
    )
    expected = torch.autograd.functional.jacobian(stock, x)
    vectorized = torch.autograd.functional.jacobian(call, x, vectorize=True)
    assert_close(vectorized, expected, rtol=1e-10, atol=1e-10)
    leaf = x.clone().requires_grad_()
    output = call(leaf)
    basis = torch.eye(12, dtype=torch.float64).view(12, *x.shape)
    rows = vmap(lambda each: torch.autograd.grad(output, leaf, each, retain_graph=True)[0])(basis)
    assert_close(rows.view_as(expected), expected, rtol=1e-10, atol=1e-10)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(call)(x), expected, rtol=1e-10, atol=1e-10)
    hessians = [torch.func.hessian(lambda x, f=f: f(x).square().sum())(x) for f in (call, stock)]
    assert_close(*hessians, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------- derivatives


@each_follow
@each_mode
@pytest.mark.usefixtures("_our_kernels")
@ignore_scripting
def test_second_and_forward_derivatives(training, activation, adds):
    shape = (3, 2, 4)
    weight, bias = randn(2, 2, seed=3, dtype=torch.float64)
    tensors = [*inputs(shape, adds, torch.float64), weight.requires_grad_(), bias.requires_grad_()]
    statistics = (None, None) if training else (torch.zeros(2).double(), torch.ones(2).double())

    def call(x, *rest):
        *residual, weight, bias = rest
        return batch_norm(
            x,
            *statistics,
            weight,
            bias,
            training,
            activation=activation,
            residual=residual[0] if residual else None,
        )

    assert gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, tensors, check_fwd_over_rev=True, check_batched_grad=True)


@each_mode
@each_shape
def test_forward_mode_gives_torchs_tangents_and_moves_the_buffers(shape, training):
    x, tangent = randn(*shape), randn(*shape, seed=1)

    def by_dual_numbers(layer):
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        return [output.primal, output.tangent], [*layer.buffers()]

    def by_transform(layer):
        parameters = dict(layer.named_parameters())

        def call(x, buffers):
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            return functional_call(layer, (parameters, buffers), x), buffers

        call = partial(call, buffers=dict(layer.named_buffers()))
        primal, tangent_, buffers = jvp(call, (x,), (tangent,), has_aux=True)
        return [primal, tangent_], [*buffers.values()]

    for way in (by_dual_numbers, by_transform):
        assert_alike(*map(way, pair(shape[1], training, "relu")))


@each_shape
def test_a_gradient_penalty_trains(shape):
    ours, theirs = pair(shape[1], True, "relu")
    (x,) = inputs(shape)

    def penalties(layer):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [parameter.grad for parameter in layer.parameters()]

    actual, expected = penalties(ours), penalties(theirs)
    largest = max(each.abs().max().item() for each in expected)
    assert_close(actual, expected, rtol=1e-3, atol=1e-5 * largest)


@each_mode
@each_shape
def test_an_input_changed_after_the_forward_pass_is_refused_by_the_backward_pass(shape, training):
    ours, _ = pair(shape[1], training)
    (leaf,) = inputs(shape)
    x = leaf * 1
    output = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_mode
@each_shape
@pytest.mark.parametrize(
    ("lazily", "at_once"),
    [
        (torch._neg_view, torch.neg),
        (lambda x: torch._efficientzerotensor(x.shape), torch.zeros_like),
    ],
    ids=["negated", "zero"],
)
def test_values_that_are_not_in_memory_as_such_are_taken_for_what_they_are(
    shape, training, lazily, at_once
):
    ours, theirs = pair(shape[1], training)
    (x,), cotangent = inputs(shape), randn(*shape, seed=2)
    (actual,) = torch.autograd.grad(ours(x), x, lazily(cotangent))
    (expected,) = torch.autograd.grad(theirs(x), x, at_once(cotangent))
    assert_alike(actual, expected)
    assert_alike(ours(lazily(x.detach())), theirs(at_once(x.detach())))


@needs_kernels
def test_evaluation_may_be_differentiated_after_the_statistics_have_moved():
    shape = SHAPES["large"]  # torch's kernel, which does small ones, reads what has moved.
    ours, _ = pair(shape[1], False)
    (x,) = inputs(shape)
    expected = seen(ours, ours, [x], steps=1)["gradients"][0]
    output = ours(x)
    with torch.no_grad():
        ours.train()(x)
    output.backward(randn(*shape, seed=10))
    assert_alike(x.grad, expected)


# ----------------------------------------------------------------------------- surroundings


def ddp_step(rank, world, file, results):
    """A step of a rank, whose layer starts with statistics of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        ours, theirs = pair(8, activation="relu")
        with torch.no_grad():
            for layer in (ours, theirs.layer):
                layer.running_mean += rank
        outcomes = []
        for layer in (ours, theirs):
            wrapped = DistributedDataParallel(layer)
            for seed in range(2):
                wrapped(randn(16, 8, 16, 16, seed=10 * rank + seed)).square().sum().backward()
            parameters = [parameter.grad for parameter in layer.parameters()]
            outcomes.append([*parameters, *(buffer.clone() for buffer in layer.buffers())])
        torch.save(outcomes, f"{results}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_data_parallel_training_is_that_of_torch(world, tmp_path):
    arguments = (world, tmp_path / "group", tmp_path / "results")
    if world == 1:
        threads = torch.get_num_threads()
        ddp_step(0, *arguments)
        torch.set_num_threads(threads)
    else:
        torch.multiprocessing.spawn(ddp_step, arguments, nprocs=world)
    for rank in range(world):
        actual, expected = torch.load(f"{tmp_path / 'results'}.{rank}")
        assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@each_mode
@each_shape
def test_a_copy_and_a_pickle_do_as_the_layer_and_share_nothing(shape, training):
    ours, theirs = pair(shape[1], training, "relu")
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    tensors = inputs(shape)
    expected = seen(theirs, theirs, tensors)
    for each in copies:
        assert_alike(seen(each, each, tensors), expected)
    assert ours.num_batches_tracked == 0


@each_mode
@each_shape
def test_a_layer_can_be_made_on_meta_and_filled_later(shape, training):
    ours, theirs = pair(shape[1], training, "relu")
    with torch.device("meta"):
        empty = BatchNorm2d(shape[1], activation="relu").train(training)
    assert empty(torch.empty(shape, device="meta")).is_meta
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(ours.state_dict())
    tensors = inputs(shape)
    assert_alike(seen(filled, filled, tensors), seen(theirs, theirs, tensors))


@each_mode
@each_shape
def test_another_default_device_does_not_reach_a_layer_in_main_memory(shape, training):
    ours, theirs = pair(shape[1], training, "relu")
    tensors = inputs(shape)
    generator_free = randn(*shape, seed=10), randn(*shape, seed=11)

    def steps(layer):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        for cotangent in generator_free:
            layer(*leaves).backward(cotangent)
        return [leaf.grad for leaf in (*leaves, *layer.parameters())], [*layer.buffers()]

    with torch.device("meta"):
        actual = steps(ours)
    assert_alike(actual, steps(theirs))


@each_mode
@each_shape
def test_autocast_in_bfloat16_keeps_float32_parameters(shape, training):
    ours, theirs = pair(shape[1], training, "relu")
    (x,) = inputs(shape)
    half = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = seen(ours, ours, [half])
        expected = seen(theirs, theirs, [half.float()])
    assert all(output.dtype == torch.bfloat16 for output in actual["outputs"])
    assert {gradient.dtype for gradient in actual["gradients"][1:]} == {torch.float32}
    eps = torch.finfo(torch.bfloat16).eps
    assert_close(
        actual["outputs"], [each.bfloat16() for each in expected["outputs"]], rtol=eps, atol=eps
    )
    assert_alike(actual["buffers"], expected["buffers"])


@each_mode
@each_shape
def test_fake_tensors_flow_through(shape, training):
    ours, _ = pair(shape[1], training, "relu")
    x = randn(*shape).to(memory_format=torch.channels_last)
    real = ours(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_layer = BatchNorm2d(shape[1], activation="relu").train(training)
        fake = mode.from_tensor(x).requires_grad_()
        output = fake_layer(fake)
        output.sum().backward()
    assert (output.shape, output.stride(), output.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.grad.shape == shape
    assert fake_layer.weight.grad.shape == (shape[1],)


@each_mode
@each_shape
def test_tensor_subclasses_take_part_as_inputs_and_as_weights(shape, training):
    ours, _ = pair(shape[1], training)
    first, second = randn(*shape), randn(*shape, seed=1)
    weight = ours.weight.detach()

    def call(x, weight):
        ours.running_mean.zero_()
        ours.running_var.fill_(1)
        statistics = (None, None) if training else (ours.running_mean, ours.running_var)
        return batch_norm(x, *statistics, weight, None, training)

    both = call(TwoTensor(first, second), weight)
    assert_alike((both.a, both.b), (call(first, weight), call(second, weight)))
    both = call(first, TwoTensor(weight, 2 * weight))
    assert_alike((both.a, both.b), (call(first, weight), call(first, 2 * weight)))


@each_shape
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_gradients(shape, use_reentrant):
    ours, theirs = pair(shape[1], activation="relu", momentum=0.0)
    tensors = inputs(shape)
    call = partial(checkpoint, ours, use_reentrant=use_reentrant)
    actual, expected = seen(call, ours, tensors), seen(theirs, theirs, tensors)
    assert_alike(actual["outputs"], expected["outputs"])
    assert_alike(actual["gradients"], expected["gradients"])
    assert ours.num_batches_tracked == 4  # As in torch, unless `update_once`.


@each_follow
@each_mode
@each_shape
def test_what_is_saved_goes_through_the_hooks(shape, training, activation, adds):
    ours, theirs = pair(shape[1], training, activation)
    tensors = inputs(shape, adds)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        actual = seen(ours, ours, tensors)
    assert shape in packed
    assert_alike(actual, seen(theirs, theirs, tensors))
    with torch.autograd.graph.save_on_cpu():
        again = seen(ours, ours, tensors, steps=1)
    assert len(again["gradients"]) == len(actual["gradients"])


@each_mode
@each_shape
def test_inference_mode_gives_the_same_values(shape, training):
    ours, theirs = pair(shape[1], training, "relu")
    x = randn(*shape)
    with torch.inference_mode():
        actual = ours(x)
    assert actual.is_inference()
    assert_alike(actual, theirs(x).detach())
    assert_alike([*ours.buffers()], [*theirs.buffers()])


# ----------------------------------------------------------------------------- operators


def operator_arguments(training, activation, adds, dtype, replicas, layout):
    x, *residual = (
        tensor.detach().to(memory_format=layout).requires_grad_()
        for tensor in inputs((4, 3, 2, 2), adds, dtype)
    )
    channels = replicas * 3
    arithmetic = native.ARITHMETIC[dtype]
    weight, bias, mean = randn(3, channels, seed=5, dtype=arithmetic)
    statistics = (None, None) if training else (mean, mean.square() + 0.1)
    return (
        x,
        residual[0] if residual else None,
        weight.requires_grad_(),
        bias.requires_grad_(),
        *statistics,
        1e-5,
        activation,
        0.01,
        training,
        replicas,
    )


OPERATOR_CASES = [
    (torch.float32, 1, torch.contiguous_format),
    (torch.bfloat16, 1, torch.channels_last),
    (torch.float64, 2, torch.contiguous_format),
    (torch.float32, 2, torch.channels_last),
]


def in_every_case(test):
    each_case = pytest.mark.parametrize(("dtype", "replicas", "layout"), OPERATOR_CASES, ids=str)
    return needs_kernels(each_follow(each_mode(each_case(test))))


@in_every_case
def test_opcheck_passes_the_operator(training, activation, adds, dtype, replicas, layout):
    arguments = operator_arguments(training, activation, adds, dtype, replicas, layout)
    torch.library.opcheck(torch.ops.normlab.batch_norm.default, arguments)


@in_every_case
def test_opcheck_passes_the_backward_operator(training, activation, adds, dtype, replicas, layout):
    arguments = operator_arguments(training, activation, adds, dtype, replicas, layout)
    arguments = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    output, statistics = torch.ops.normlab.batch_norm(*arguments)
    x, _, weight, bias, *_ = arguments
    options = (1e-5, activation, 0.01, training, replicas, [True, True])
    torch.library.opcheck(
        torch.ops.normlab.batch_norm_backward.default,
        (x, x, output if adds else None, weight, bias, statistics, *options),
    )
