import copy
import io
import operator
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normlab
from normlab.errors import InputError
from normlab.layers import BatchNorm2d as OurBatchNorm2d
from normlab.surgery import convert

EXACT = {"rtol": 1e-10, "atol": 1e-10}


pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prepared(model):
    """A float64 model away from where it starts, so that each layer tells itself from the next."""
    model = model.double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.3 * randn(*parameter.shape, seed=seed)
        for seed, (name, buffer) in enumerate(model.named_buffers()):
            if "running" in name:
                buffer += randn(*buffer.shape, seed=seed).abs()
    return model


def seen(model, x, steps=3):
    """All that can be seen of three steps of training and a pass of evaluation."""
    found = {}
    for step in range(steps):
        x = (x + 0.1 * step).detach().requires_grad_()
        y = model(x)
        loss = (y * randn(*y.shape, seed=step)).sum()
        loss.backward()
        found[f"output {step}"], found[f"input {step}"] = y.detach().clone(), x.grad
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"{step} {name}"], parameter.grad = parameter.grad, None
                    parameter -= 0.01 * found[f"{step} {name}"]
    training = {module: module.training for module in model.modules()}
    model.eval()
    found["evaluation"] = model(x).detach().clone()
    for module, mode in training.items():
        module.training = mode
    return found | {name: value.clone() for name, value in model.state_dict().items()}


def assert_converted(model, x, expected, **options):
    """Convert, compare all that can be seen with the original, return the copy and the report."""
    model = prepared(model)
    before = copy.deepcopy(model.state_dict())
    converted, report = convert(model, **options)
    assert report.replaced == expected
    assert list(converted.state_dict()) == list(before)
    converted.load_state_dict(before)
    model.load_state_dict(converted.state_dict())
    pristine = copy.deepcopy(converted)
    assert_close(seen(converted, x), seen(model, x), **EXACT)
    return pristine, report


def small(channels=3):
    return randn(4, channels, 6, 6)


def large(channels=3):
    """More values than `normlab.layers.fused.SMALL` after 16 channels, for normlab's kernels."""
    return randn(4, channels, 24, 24)


each_size = pytest.mark.parametrize("x", [small(), large()], ids=["small", "large"])


def conv(inputs=3, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)


class Net(nn.Module):
    """A convolution and a batch norm, and what a test does with them."""

    def __init__(self, **modules):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(16)
        for name, module in modules.items():
            setattr(self, name, module)


def net(function, **modules):
    """A `Net` with a forward pass of a test's own."""
    cls = type("Net", (Net,), {"forward": function})
    return cls(**modules)


class Block(nn.Module):
    expansion = 1

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 for images of 32x32, narrow."""

    def __init__(self, widths=(4, 8, 16, 32)):
        super().__init__()
        self.conv1, self.bn1 = conv(3, widths[0]), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        inputs = widths[0]
        for i, width in enumerate(widths):
            blocks = [Block(inputs, width, 1 if i == 0 else 2), Block(width, width)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = width
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


RESNET = {"bn1": "BatchNorm2d + relu"} | {
    f"layer{i}.{j}.{name}": what
    for i in range(1, 5)
    for j in range(2)
    for name, what in [
        ("bn1", "BatchNorm2d + relu"),
        ("bn2", "BatchNorm2d + add + relu"),
        ("downsample.1", "BatchNorm2d"),
    ]
    if name != "downsample.1" or (i > 1 and j == 0)
}


def test_unknown_target():
    with pytest.raises(
        InputError, match=r"^unknown target 'bacth': known are 'batch', 'torch-batch', .* \(did you"
    ):
        convert(nn.ReLU(), "bacth")
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got int"):
        convert(3)


@each_size
@pytest.mark.parametrize(
    ("activation", "name", "slope"),
    [
        (nn.ReLU(), "relu", 0.01),
        (nn.ReLU(inplace=True), "relu", 0.01),
        (nn.LeakyReLU(0.2, inplace=True), "leaky_relu", 0.2),
        (nn.Sigmoid(), "sigmoid", 0.01),
        (nn.SiLU(inplace=True), "silu", 0.01),
    ],
    ids=lambda value: str(value),
)
def test_sequence(x, activation, name, slope):
    model = nn.Sequential(conv(), nn.BatchNorm2d(16), copy.deepcopy(activation), conv(16, 2))
    result, report = assert_converted(model, x, {"1": f"BatchNorm2d + {name}"})
    assert type(result[1]) is OurBatchNorm2d
    assert (result[1].activation, result[1].negative_slope, result[1].name) == (name, slope, "1")
    assert type(result[2]) is nn.Identity
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[2]) is type(activation)
    assert not report.unfused
    assert not report.rewritten


class Steps(fx.Tracer):
    def is_leaf_module(self, *_):
        return True


FUNCTIONS = {
    "F.relu": (lambda s, x: F.relu(s.bn(s.conv(x))), "relu"),
    "F.relu in place": (lambda s, x: F.relu(s.bn(s.conv(x)), inplace=True), "relu"),
    "F.relu_": (lambda s, x: F.relu_(s.bn(s.conv(x))), "relu"),
    "torch.relu": (lambda s, x: torch.relu(s.bn(s.conv(x))), "relu"),
    "torch.relu_": (lambda s, x: torch.relu_(s.bn(s.conv(x))), "relu"),
    ".relu": (lambda s, x: s.bn(s.conv(x)).relu(), "relu"),
    ".relu_": (lambda s, x: s.bn(s.conv(x)).relu_(), "relu"),
    "F.leaky_relu": (lambda s, x: F.leaky_relu(s.bn(s.conv(x))), "leaky_relu"),
    "F.leaky_relu 0.3": (lambda s, x: F.leaky_relu(s.bn(s.conv(x)), 0.3), "leaky_relu"),
    "F.leaky_relu_": (
        lambda s, x: F.leaky_relu_(s.bn(s.conv(x)), negative_slope=0.3),
        "leaky_relu",
    ),
    "torch.sigmoid": (lambda s, x: torch.sigmoid(s.bn(s.conv(x))), "sigmoid"),
    ".sigmoid": (lambda s, x: s.bn(s.conv(x)).sigmoid(), "sigmoid"),
    ".sigmoid_": (lambda s, x: s.bn(s.conv(x)).sigmoid_(), "sigmoid"),
    "F.silu": (lambda s, x: F.silu(s.bn(s.conv(x))), "silu"),
    "F.relu input=": (lambda s, x: F.relu(input=s.bn(s.conv(x))), "relu"),
}


@each_size
@pytest.mark.parametrize(("function", "name"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_function(x, function, name):
    model = net(function)
    result, report = assert_converted(model, x, {"bn": f"BatchNorm2d + {name}"})
    assert isinstance(result, type(model))
    assert report.rewritten == {"": "Net"}
    steps = [step.op for step in Steps().trace(result).nodes]
    assert steps == ["placeholder", "call_module", "call_module", "output"]


def late(s, x):
    out = s.bn(s.conv(x))
    identity = s.other(x)
    out += identity
    return F.relu(out)


ADDITIONS = {
    "+": lambda s, x: F.relu(s.bn(s.conv(x)) + x[:, :1]),
    "+ the other way": lambda s, x: torch.relu(s.other(x) + s.bn(s.conv(x))),
    "+=": late,
    "torch.add": lambda s, x: s.act(torch.add(s.other(x), s.bn(s.conv(x)))),
    "operator.add": lambda s, x: operator.add(s.bn(s.conv(x)), s.other(x)).relu(),
    "operator.iadd": lambda s, x: operator.iadd(s.bn(s.conv(x)), s.other(x)).relu_(),
    "iadd to what only it reads": lambda s, x: operator.iadd(s.other(x), s.bn(s.conv(x))).relu_(),
    "a parameter": lambda s, x: F.relu(s.bn(s.conv(x)) + s.shift),
}


@each_size
@pytest.mark.parametrize("function", ADDITIONS.values(), ids=ADDITIONS)
def test_addition(x, function):
    shift = nn.Parameter(torch.ones(16, 1, 1))
    model = net(function, other=conv(), act=nn.ReLU(), shift=shift)
    result, _ = assert_converted(model, x, {"bn": "BatchNorm2d + add + relu"})
    assert isinstance(result.bn, OurBatchNorm2d)


NOT_FUSED = {
    "read twice": (lambda s, x: F.relu(y := s.bn(s.conv(x))) + y, "read by several steps"),
    "read before it changes in place": (
        lambda s, x: (y := s.bn(s.conv(x))).view(-1).mean() + y.relu_(),
        "read by several steps",
    ),
    "added to itself": (
        lambda s, x: F.relu((y := s.bn(s.conv(x))) + y),
        "not one other tensor",
    ),
    "added a number": (lambda s, x: F.relu(s.bn(s.conv(x)) + 1), "not one other tensor"),
    "alpha": (
        lambda s, x: F.relu(torch.add(s.bn(s.conv(x)), s.other(x), alpha=2)),
        "not one other tensor",
    ),
    "no ReLU after": (lambda s, x: torch.sigmoid(s.bn(s.conv(x)) + s.other(x)), "no ReLU"),
    "sum read twice": (
        lambda s, x: F.relu(y := s.bn(s.conv(x)) + s.other(x)) + y,
        "read by several steps",
    ),
    "called twice": (lambda s, x: F.relu(s.bn(F.relu(s.bn(s.conv(x))))), "several places"),
    "another activation": (lambda s, x: torch.tanh(s.bn(s.conv(x))), "no activation follows it"),
    "in place to what others read": (
        lambda s, x: F.relu(operator.iadd(y := s.other(x), s.bn(s.conv(x)))) + y,
        "added in place",
    ),
}


@each_size
@pytest.mark.parametrize(("function", "reason"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_not_fused(x, function, reason):
    model = net(function, other=conv())
    _, report = assert_converted(model, x, {"bn": "BatchNorm2d"})
    assert reason in report.unfused["bn"]
    assert not report.rewritten


def test_value_that_is_an_output_too():
    model = prepared(net(lambda s, x: (y := s.bn(s.conv(x)), F.relu(y))))
    result, report = convert(model)
    assert report.unfused == {"bn": "its output is read by several steps"}
    assert_close(result(small()), model(small()), **EXACT)


def test_input_that_changes_before_the_addition():
    def forward(self, x):
        y = self.conv(x)
        view = y.view_as(y)
        out = self.bn(view)
        out = out + F.relu_(y)
        return F.relu(out)

    # torch refuses to differentiate this one, so the values have to do.
    model = prepared(net(forward)).eval()
    result, report = convert(model)
    assert report.unfused == {"bn": "its input may change before the addition"}
    with torch.no_grad():
        assert_close(result(small()), model(small()), **EXACT)


@each_size
def test_two_batch_norms_are_added(x):
    model = net(
        lambda s, x: F.relu(s.bn(s.conv(x)) + s.bn2(s.conv2(x))),
        conv2=conv(),
        bn2=nn.BatchNorm2d(16),
    )
    expected = {"bn": "BatchNorm2d", "bn2": "BatchNorm2d + add + relu"}
    assert_converted(model, x, expected)


def test_resnet():
    result, report = assert_converted(ResNet(), randn(2, 3, 32, 32), RESNET)
    assert set(report.unfused) == {f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
    assert set(report.unfused.values()) == {
        "it ends an nn.Sequential, which takes nothing to be added"
    }
    assert report.rewritten == {"": "ResNet"} | {
        f"layer{i}.{j}": "Block" for i in range(1, 5) for j in range(2)
    }
    assert all(isinstance(block, Block) and block.expansion == 1 for block in result.layer1)
    assert result.layer2[0].bn2.name == "layer2.0.bn2"
    with pytest.raises(ValueError, match=r"in BatchNorm2d\(8\) 'layer2.0.bn2'"):
        result.layer2[0].bn2(torch.rand(2, 8))


def test_resnet_by_the_kernels():
    assert_converted(ResNet((16, 16, 16, 16)), randn(4, 3, 32, 32), RESNET)


def test_without_fusing():
    result, report = assert_converted(
        ResNet(), randn(2, 3, 32, 32), dict.fromkeys(RESNET, "BatchNorm2d"), fuse=False
    )
    assert type(result) is ResNet
    assert not report.unfused
    assert not report.rewritten


def test_nested_sequences_and_a_parent_that_activates():
    body = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(16)), nn.ReLU(), conv(16, 16))
    tail = nn.Sequential(conv(16, 16), nn.BatchNorm2d(16))
    model = net(lambda s, x: F.silu(s.tail(s.body(x))), body=body, tail=tail)
    expected = {
        "bn": "BatchNorm2d",
        "body.0.1": "BatchNorm2d + relu",
        "tail.1": "BatchNorm2d + silu",
    }
    assert_converted(model, small(), expected)


class Taps(nn.Module):
    """Reads the values inside of a sequence."""

    def __init__(self, way):
        super().__init__()
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16))
        self.way = way

    def forward(self, x):
        if self.way == "slice":
            return self.body[:2](x) + self.body(x)
        if self.way == "untraceable" and x.sum() > 1e9:
            return self.body[:2](x)
        taps = []
        for layer in self.body:
            x = layer(x)
            taps.append(x)
        return taps[1] + taps[-1]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("slice", "called from several places"),
        ("iteration", "called from several places"),
        ("untraceable", "the forward of Taps cannot be traced: symbolically traced"),
    ],
)
def test_sequence_that_is_read_inside(way, reason):
    model = Taps(way)
    _, report = assert_converted(model, small(), {"body.1": "BatchNorm2d"})
    assert reason in report.unfused["body.1"]


def test_layer_that_its_sequence_calls_too():
    model = net(
        lambda s, x: F.relu(s.body[1](s.conv(x))) - s.body(x),
        body=nn.Sequential(conv(), nn.BatchNorm2d(16)),
    )
    expected = {"bn": "BatchNorm2d", "body.1": "BatchNorm2d"}
    _, report = assert_converted(model, small(), expected)
    assert report.unfused["body.1"] == "it is called from several places"


def test_layer_that_is_handed_on():
    model = net(
        lambda s, x: F.relu(s.bn(y := s.conv(x))) - checkpoint(s.bn, y, use_reentrant=False)
    )
    _, report = assert_converted(model, small(), {"bn": "BatchNorm2d"})
    assert report.unfused["bn"] == "it is called from several places"


def test_hook_before_an_addition_sees_what_it_saw():
    model = prepared(net(lambda s, x: F.relu(s.bn(s.conv(x)) + s.other(x)), other=conv()))
    notes = Notes()
    model.bn.register_forward_pre_hook(notes)
    result, report = convert(model)
    assert report.unfused == {"bn": "it has hooks, which would not see what is added"}
    assert_close(result(small()), model(small()), **EXACT)
    assert_close(notes[0], notes[1], **EXACT)


def test_activation_in_a_sequence_that_is_called_by_itself_too():
    body = nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16))
    model = net(lambda s, x: s.body[2](s.body(x)), body=body)
    expected = {"bn": "BatchNorm2d", "body.1": "BatchNorm2d"}
    _, report = assert_converted(model, small(), expected)
    assert report.unfused["body.1"] == "the activation after it is used elsewhere too"


def test_shared_modules_stay_one():
    bn, act = nn.BatchNorm2d(16), nn.ReLU()
    model = nn.Sequential(conv(), bn, nn.ReLU(), conv(16, 16), bn, act, conv(16, 16))
    model.append(nn.Sequential(nn.BatchNorm2d(16), act))
    result, report = assert_converted(model, small(), {"1": "BatchNorm2d", "7.0": "BatchNorm2d"})
    assert result[1] is result[4]
    assert result[5] is result[7][1]
    assert report.unfused == {
        "1": "it is shared by several places",
        "7.0": "the activation after it is used elsewhere too",
    }


def test_shared_block_is_rewritten_once():
    block = net(lambda s, x: F.sigmoid(s.bn(s.conv(x))))
    block.conv = conv(16, 16)
    model = nn.Sequential(conv(), block, block)
    result, _ = assert_converted(model, small(), {"1.bn": "BatchNorm2d + sigmoid"})
    assert result[1] is result[2]


def test_tied_and_frozen_parameters():
    model = nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))
    model[4].weight = model[1].weight
    model[1].bias.requires_grad_(False)
    model[4].eval()
    result, _ = assert_converted(model, small(), {"1": "BatchNorm2d + relu", "4": "BatchNorm2d"})
    assert result[4].weight is result[1].weight
    assert not result[1].bias.requires_grad
    assert result[4].weight.requires_grad
    assert [module.training for module in result] == [module.training for module in model]


class Notes(list):
    """Survives a copy of the model, so that the copy's hooks write to the same list."""

    def __deepcopy__(self, memo):
        return self

    def __call__(self, *arguments):
        self.append([*pluck(arguments)])


def pluck(value):
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from pluck(each)


HOOKS = {
    "layer's output": (1, "register_forward_hook", "it has hooks"),
    "layer's gradient": (1, "register_full_backward_hook", "it has hooks"),
    "layer's gradient before": (1, "register_full_backward_pre_hook", "it has hooks"),
    "layer's input": (1, "register_forward_pre_hook", None),
    "activation's output": (2, "register_forward_hook", "the activation after it has hooks"),
    "activation's input": (2, "register_forward_pre_hook", "the activation after it has hooks"),
    "convolution's": (0, "register_forward_hook", None),
}


@pytest.mark.parametrize(("place", "register", "reason"), HOOKS.values(), ids=HOOKS)
def test_hooks_fire_and_see_what_they_saw(place, register, reason):
    model = prepared(nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 2)))
    notes = Notes()
    getattr(model[place], register)(notes)
    result, report = convert(model)
    assert ("1" in report.unfused) == (reason is not None)
    assert reason is None or reason in report.unfused["1"]
    found = []
    for each in (model, result):
        notes.clear()
        each(small().requires_grad_()).sum().backward()
        found.append([*notes])
    assert found[0]
    assert_close(found[1], found[0], **EXACT)


def test_hooks_of_a_rewritten_module_and_of_state_dicts():
    notes, states = Notes(), []
    model = prepared(net(lambda s, x: F.relu(s.bn(s.conv(x)))))
    model.register_forward_hook(notes)
    model.bn.register_forward_pre_hook(notes)
    for module in (model, model.bn):
        module.register_state_dict_post_hook(lambda *arguments: states.append(arguments[2]))
        module.register_load_state_dict_pre_hook(lambda *_: states.append("load"))
    result, report = convert(model)
    assert not report.unfused
    x = small()
    y = result(x)
    assert_close(notes, [[model.conv(x)], [x, y]], **EXACT)
    result.load_state_dict(result.state_dict())
    assert states == ["bn.", "", "load", "load"]


def test_attributes_are_kept():
    model = net(lambda s, x: F.relu(s.bn(s.conv(x))), unused=nn.Linear(2, 2), act=nn.ReLU())
    model.note, model.bn.note, model.bn.name = [1], "mine", "my name"
    model.bn.extra = nn.Parameter(torch.ones(3))
    model.register_buffer("extra", torch.ones(2), persistent=False)
    result, _ = convert(model)
    assert (result.note, result.bn.note, result.bn.name) == ([1], "mine", "my name")
    assert result.note is not model.note
    assert [*dict(result.named_parameters())] == [*dict(model.named_parameters())]
    assert [*result._modules] == ["conv", "bn", "unused", "act"]
    assert [*dict(result.named_buffers())] == [*dict(model.named_buffers())]
    assert "extra" not in result.state_dict()
    assert repr(result) == repr(model).replace("stats=True", "stats=True, activation='relu'")


def test_attribute_that_became_part_of_the_forward_pass():
    model = prepared(net(lambda s, x: F.relu(s.bn(s.conv(x))) * s.scale))
    model.scale = 0.5
    result, _ = convert(model)
    assert_close(result(small()), model(small()), **EXACT)
    result.scale = 0.5
    result.other = 3
    with pytest.raises(InputError, match=r"scale = 0.5 is part of the forward pass of Net"):
        copy.deepcopy(result).scale = 0.7


class Autograd(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.sign()

    @staticmethod
    def backward(_, grad):
        return grad


def functional_dropout(self, x):
    return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


def no_grad(self, x):
    with torch.no_grad():
        y = self.conv(x)
    return F.relu(self.bn(y))


def enable_grad(self, x):
    with torch.enable_grad():
        return F.relu(self.bn(self.conv(x)))


def counts(self, x):
    self.steps += 1
    return F.relu(self.bn(self.conv(x)))


def appends(self, x):
    self.log.append(1)
    return F.relu(self.bn(self.conv(x)))


def asks_type(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y if isinstance(x, torch.Tensor) else y * 2


def branches(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y * 2 if y.sum() > 0 else y


def draws(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y if random.random() < 2 else x


def draws_tensor(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y if torch.rand(()) < 2 else x


def optional(self, x, skip=None):
    y = self.bn(self.conv(x))
    return F.relu(y if skip is None else y + skip)


def variadic(self, *inputs):
    return F.relu(self.bn(self.conv(inputs[0])))


def checkpointed(self, x):
    return F.relu(checkpoint(lambda x: self.bn(self.conv(x)), x, use_reentrant=False))


UNFAITHFUL = {
    functional_dropout: "the forward of Net depends on the mode",
    no_grad: "it switches gradients",
    enable_grad: "it switches gradients",
    lambda self, x: Autograd.apply(F.relu(self.bn(self.conv(x)))): "it switches gradients",
    counts: "it changes attributes",
    appends: "it changes attributes",
    asks_type: "it asks for the type of a value",
    branches: "cannot be traced: symbolically traced variables",
    draws: "it draws random numbers",
    draws_tensor: "it draws random numbers",
    optional: "has optional arguments",
    variadic: "has optional arguments",
    checkpointed: "cannot be traced",
}


@pytest.mark.parametrize(
    ("function", "reason"), UNFAITHFUL.items(), ids=[each.__name__ for each in UNFAITHFUL]
)
def test_forward_that_a_graph_cannot_tell(function, reason):
    model = net(function)
    model.steps, model.log = 0, []
    torch.manual_seed(0)
    random.seed(0)
    states = random.getstate(), torch.get_rng_state()
    model = prepared(model)
    result, report = convert(model)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert reason in report.unfused["bn"]
    assert report.replaced == {"bn": "BatchNorm2d"}
    assert type(result) is type(model)
    assert (result.steps, result.log, result.training) == (0, [], True)
    assert vars(result).keys() == vars(model).keys()
    found = []
    for each in (model, result):
        torch.manual_seed(1)
        found.append(seen(each, large()))
    assert_close(*found, **EXACT)
    assert result.steps == model.steps
    assert result.log == model.log


def test_forward_that_changes_in_place_what_has_two_names():
    """`torch.fx` by itself makes `+=` a `+`, which leaves the other name behind."""

    def forward(self, x):
        skip = self.conv(x)
        alias = skip
        skip += 1
        skip *= self.other(x)
        return F.relu(self.bn(alias))

    assert_converted(net(forward, other=conv()), small(), {"bn": "BatchNorm2d + relu"})


def test_public_method_that_reads_the_layer():
    class WithFeatures(Net):
        def forward(self, x):
            return F.relu(self._features(x))

        def _features(self, x):
            return self.bn(self.conv(x))

        def features(self, x):
            return self._features(x)

    model = prepared(WithFeatures())
    result, report = convert(model)
    assert report.unfused == {"bn": "WithFeatures.features reads it too"}
    assert_close(result.features(small()), model.features(small()), **EXACT)


def test_buffer_that_the_forward_pass_counts_in():
    def forward(self, x):
        self.calls.add_(1)
        return F.relu(self.bn(self.conv(x)))

    model = net(forward)
    model.register_buffer("calls", torch.tensor(0))
    result, _ = assert_converted(model, small(), {"bn": "BatchNorm2d + relu"})
    result(small())
    assert result.calls == 0 + 1


class Plain(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)

    def extra_repr(self):
        return "plain"

    def __repr__(self):
        return "Plain()"


class Frozen(nn.BatchNorm2d):
    def train(self, _=True):
        return super().train(False)


class Forward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def test_subclasses():
    model = nn.Sequential(conv(), Plain(16), Frozen(16), nn.ReLU(), Forward(16), nn.ReLU())
    model.append(OurBatchNorm2d(16))
    expected = {"1": "BatchNorm2d (was Plain)"}
    result, report = assert_converted(model, small(), expected)
    assert report.skipped == {
        "2": "its class Frozen has train of its own",
        "4": "its class Forward has forward of its own",
    }
    assert type(result[1]) is OurBatchNorm2d
    assert [type(result[i]) for i in (2, 4, 6)] == [Frozen, Forward, OurBatchNorm2d]


def test_parametrized_and_occupied_layers_are_left():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    model[1].activation = "mine"
    model[2].forward = model[1].forward
    result, report = convert(model)
    assert not report.replaced
    assert set(report.skipped) == {"0", "1", "2"}
    assert_close(result(randn(4, 3).float()), model(randn(4, 3).float()))
    there, _ = convert(model, "rms")  # Which has no such attribute.
    assert [type(each) for each in there] == [
        type(model[0]),
        normlab.layers.RMSNorm,
        type(model[2]),
    ]
    assert convert(there, "torch-batch")[0][1].activation == "mine"


def test_every_class():
    model = nn.ModuleList(
        [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    )
    for layer in convert(model)[0]:
        assert type(layer) is getattr(normlab, type(layer).__name__)


@pytest.mark.parametrize(
    ("lazy", "x"),
    [
        (nn.LazyBatchNorm1d, randn(4, 3)),
        (nn.LazyBatchNorm2d, randn(4, 3, 4, 4)),
        (nn.LazyBatchNorm3d, randn(4, 3, 2, 4, 4)),
    ],
)
def test_lazy(lazy, x):
    model = nn.Sequential(lazy(), nn.ReLU()).double()
    result, report = convert(model)
    assert report.replaced == {"0": f"{lazy.__name__} + relu"}
    assert_close(seen(result, x), seen(model, x), **EXACT)
    assert type(result[0]) is getattr(normlab, type(model[0]).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype):
    result, _ = convert(ResNet().to(dtype))
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert result(randn(2, 3, 32, 32).to(dtype)).dtype == dtype


def test_model_that_is_a_layer():
    result, report = convert(nn.BatchNorm1d(3))
    assert type(result) is normlab.BatchNorm1d
    assert str(report).splitlines()[1] == "  the model: BatchNorm1d (no activation follows it)"


def test_graph_module():
    model = prepared(ResNet())
    result, report = convert(fx.symbolic_trace(model))
    fused = [name for name, what in report.replaced.items() if "+" in what]
    assert len(fused) == 17
    x = randn(2, 3, 32, 32)
    found = seen(copy.deepcopy(result), x)
    expected = seen(model, x)
    assert_close(found, {name: expected[name] for name in found}, **EXACT)


def ways():
    def saved(model):
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
        "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
        "converted again": lambda model: convert(model)[0],
    }


@pytest.mark.parametrize("way", ways().values(), ids=ways())
def test_copies_of_the_result(way):
    model = prepared(ResNet())
    result, _ = convert(model)
    again = way(result)
    assert list(again.state_dict()) == list(result.state_dict())
    assert isinstance(again.layer1[0], Block)
    for one, other in zip(again.parameters(), result.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()
    assert_close(seen(again, randn(2, 3, 32, 32)), seen(model, randn(2, 3, 32, 32)), **EXACT)
    assert seen(result, randn(2, 3, 32, 32), steps=0).keys() == model.state_dict().keys() | {
        "evaluation"
    }


def test_converting_again_changes_nothing():
    result, _ = convert(ResNet())
    again, report = convert(result)
    assert not report.replaced
    assert not report.rewritten
    assert not report.unfused
    assert repr(again) == repr(result)


def test_original_is_untouched():
    model = prepared(ResNet())
    model.layer2.eval()
    before = pickle.dumps(model)
    result, _ = convert(model)
    seen(result, randn(2, 3, 32, 32))
    assert pickle.dumps(model) == before


def test_tracing_and_scripts_of_torch():
    model, x = prepared(ResNet()), randn(2, 3, 32, 32)
    result, _ = convert(model)
    expected = model(x)
    assert_close(torch.compile(copy.deepcopy(result), backend="eager")(x), expected, **EXACT)
    assert_close(fx.symbolic_trace(copy.deepcopy(result))(x), expected, **EXACT)


def test_report_reads_well():
    model = nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), Frozen(16))
    _, report = convert(nn.Sequential(model, Block(16, 16)))
    assert str(report) == (
        "4 batch norm layers replaced, 3 with what follows them; 1 left as they were; "
        "1 forward passes rewritten\n"
        "  0.1: BatchNorm2d + relu\n"
        "  0.3: BatchNorm2d (no activation follows it)\n"
        "  1.bn1: BatchNorm2d + relu\n"
        "  1.bn2: BatchNorm2d + add + relu\n"
        "  0.4: left, its class Frozen has train of its own\n"
        "  1: forward pass of Block rewritten"
    )
    with pytest.raises(AttributeError):
        report.replaced = {}
