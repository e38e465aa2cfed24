import math

import pytest
import torch
from torch import nn

from normlab.errors import InputError
from normlab.layers import BatchNorm1d, BatchNorm2d
from normlab.networks import ACTIVATIONS, build_network

ARMS = [
    "plain",
    "batch",
    "torch-batch",
    "layer",
    "group:2",
    "rms",
    "dropout:0.5",
    "batch+dropout:0.2",
]


def build(name="mlp:32,32", arm="batch", seed=0, shape=(1, 28, 28), **options):
    return build_network(name, arm, seed, image_shape=shape, classes=10, **options)


def names(network, kind):
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


def order(network, block):
    return [name for name, _ in getattr(network, block).named_children()]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["mlp:32,32", "mlp:8", "cnn:8,8,4", "lenet"])
def test_every_arm_trains_a_step_in_every_network(name, arm):
    network = build(name, arm)
    loss = nn.functional.cross_entropy(network(torch.rand(4, 1, 28, 28)), torch.arange(4))
    loss.backward()
    for parameter in network.parameters():
        assert parameter.grad.isfinite().all()


def test_the_cnn_pools_after_every_second_convolution_and_ends_in_one_layer():
    network = build("cnn:4,4,6,6,8", shape=(3, 13, 10)).eval()
    assert [name for name, _ in network.named_children()] == [
        *("conv0", "conv1", "pool1", "conv2", "conv3", "pool3", "conv4", "flatten", "output")
    ]
    assert names(network, BatchNorm2d) == [f"conv{i}.norm" for i in range(5)]
    assert [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)] == [
        *((4, 3, 3, 3), (4, 4, 3, 3), (6, 4, 3, 3), (6, 6, 3, 3), (8, 6, 3, 3))
    ]
    x = torch.rand(2, 3, 13, 10)
    assert network[:3](x).shape == (2, 4, 6, 5)
    assert network[:3](x).equal(nn.functional.max_pool2d(network[:2](x), 2))
    assert network.output.weight.shape == (10, 8 * 3 * 2)
    assert network(x).shape == (2, 10)


@pytest.mark.parametrize("arm", ["plain", "batch", "group:8", "batch+dropout:0.2"])
def test_resnet18_trains_a_step(arm):
    network = build("resnet18", arm, shape=(3, 16, 16))
    loss = nn.functional.cross_entropy(network(torch.rand(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert len(names(network, nn.Dropout)) == ("dropout" in arm)


def test_resnet18_is_that_of_the_paper_with_a_first_convolution_for_small_images():
    network = build("resnet18", shape=(3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == 11_173_962
    assert len(names(network, nn.Conv2d)) == len(names(network, BatchNorm2d)) == 20
    assert network.pool(network[:5](torch.rand(1, 3, 32, 32))).shape == (1, 512, 1, 1)
    block = network.stage1[0].eval()
    x = torch.randn(2, 64, 8, 8)
    branch = block.norm1(block.conv1(block.norm0(block.conv0(x)).relu()))
    assert torch.equal(block(x), (branch + block.shortcut(x)).relu())


@pytest.mark.parametrize("position", ["post", "input"])
def test_resnet18_has_its_norms_in_one_place(position):
    with pytest.raises(InputError, match=f"before the activation: leave @{position} out"):
        build("resnet18", f"batch@{position}", shape=(3, 32, 32))


def test_lenet_takes_instance_norm_where_there_is_something_to_normalize_over():
    network = build("lenet", "instance")
    assert names(network, nn.InstanceNorm2d) == ["conv0.norm", "conv1.norm"]
    with pytest.raises(InputError, match="finds nothing to normalize in mlp:8"):
        build("mlp:8", "instance")


def test_the_mlp_of_the_study_has_the_shapes_of_the_text():
    shapes = {name: tuple(p.shape) for name, p in build().named_parameters() if p.ndim == 2}
    assert shapes == {
        "hidden0.linear.weight": (32, 784),
        "hidden1.linear.weight": (32, 32),
        "output.weight": (10, 32),
    }
    assert names(build(), BatchNorm1d) == ["hidden0.norm", "hidden1.norm"]


def test_lenet_has_the_shapes_of_the_text():
    network, x, shapes = build("lenet", activation="sigmoid"), torch.rand(2, 1, 28, 28), {}
    for name, part in network.named_children():
        x = part(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes == {
        "conv0": (6, 24, 24),
        "pool0": (6, 12, 12),
        "conv1": (16, 8, 8),
        "pool1": (16, 4, 4),
        "flatten": (256,),
        "hidden0": (120,),
        "hidden1": (84,),
        "output": (10,),
    }
    assert names(network, BatchNorm2d) == ["conv0.norm", "conv1.norm"]
    assert names(network, BatchNorm1d) == ["hidden0.norm", "hidden1.norm"]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("plain", ["linear", "activation"]),
        ("batch", ["linear", "norm", "activation"]),
        ("batch@post", ["linear", "activation", "norm"]),
        ("batch@input", ["norm", "linear", "activation"]),
        ("batch+dropout:0.5", ["linear", "norm", "activation", "dropout"]),
        ("batch@post+dropout:0.5", ["linear", "activation", "norm", "dropout"]),
    ],
)
def test_the_slots_are_filled_in_order(arm, expected):
    assert order(build(arm=arm), "hidden0") == expected


def test_a_norm_on_the_input_has_the_width_of_the_input():
    network = build(arm="batch@input")
    assert network.hidden0.norm.num_features == 784
    assert network.hidden1.norm.num_features == 32


@pytest.mark.parametrize("arm", [*ARMS[1:], "batch@post", "batch@input"])
@pytest.mark.parametrize("name", ["mlp:32,32", "lenet"])
def test_layers_that_two_arms_share_start_from_the_same_values(name, arm):
    plain, other = build(name, "plain", 3).state_dict(), build(name, arm, 3).state_dict()
    assert set(plain) <= set(other)
    for key, value in plain.items():
        assert value.equal(other[key]), key


def test_seeds_and_layers_differ():
    first, second = build("mlp:32,32,32", seed=0), build("mlp:32,32,32", seed=1)
    assert not first.hidden1.linear.weight.equal(second.hidden1.linear.weight)
    assert not first.hidden1.linear.weight.equal(first.hidden2.linear.weight)


def test_the_global_generator_is_left_alone_and_does_not_matter():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = build("lenet", "batch+dropout:0.5")
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    second = build("lenet", "batch+dropout:0.5")
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("init", ["torch", "xavier"])
def test_first_values_follow_the_scheme(init):
    layer = build("mlp:1000", "plain", init=init).requires_grad_(False).hidden0.linear
    limit = 1 / math.sqrt(784) if init == "torch" else math.sqrt(6 / (784 + 1000))
    assert float(layer.weight.abs().max()) == pytest.approx(limit, rel=1e-3)
    assert float(layer.weight.std()) == pytest.approx(limit / math.sqrt(3), rel=1e-2)
    assert 0.9 / math.sqrt(784) < float(layer.bias.abs().max()) <= 1 / math.sqrt(784)


def test_torchs_scheme_is_torchs():
    ours = build("mlp:64", "plain", seed=5).hidden0.linear.weight.detach()
    theirs = nn.Linear(784, 64).weight.detach()
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)
    assert abs(float(ours.mean())) < 1e-3


def test_norms_start_as_torchs_do():
    norm = build(arm="batch").hidden0.norm
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    assert norm.running_mean.eq(0).all()
    assert norm.running_var.eq(1).all()
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_activation_is_the_one_asked_for(activation):
    network = build(activation=activation)
    assert type(network.hidden0.activation) is ACTIVATIONS[activation]


@pytest.mark.parametrize(
    ("name", "arm", "shape", "message"),
    [
        (
            "resnet",
            "plain",
            (1, 28, 28),
            "unknown network 'resnet'.*: known are lenet, resnet18, mlp:32,32, cnn:32,32,64,64,",
        ),
        ("leenet", "plain", (1, 28, 28), "did you mean lenet"),
        ("mlp", "plain", (1, 28, 28), "wants its hidden sizes"),
        ("mlp:", "plain", (1, 28, 28), "wants its hidden sizes"),
        ("mlp:32,0", "plain", (1, 28, 28), "whole numbers from 1 to 65536"),
        ("mlp:32,-4", "plain", (1, 28, 28), "whole numbers from 1 to 65536"),
        ("mlp:99999999999", "plain", (1, 28, 28), "whole numbers from 1 to 65536"),
        ("mlp:a", "plain", (1, 28, 28), "whole numbers from 1 to 65536"),
        ("cnn", "plain", (1, 28, 28), "cnn wants its channels, .* as in cnn:32,32,64,64"),
        ("cnn:8,x", "plain", (1, 28, 28), "cnn wants its channels"),
        ("cnn:1,1,1,1,1,1", "plain", (1, 9, 7), "pools 3 times and needs .* 8×8, and got 9×7"),
        ("lenet", "plain", (1, 12, 12), "at least 16×16, and got 12×12"),
        ("mlp:30", "group:8", (1, 28, 28), "group:8 does not divide a layer of 30 channels"),
        ("mlp:8", "group:8", (1, 28, 28), "leaves one value in a group"),
    ],
)
def test_what_cannot_be_built_is_refused(name, arm, shape, message):
    with pytest.raises(InputError, match=message):
        build(name, arm, shape=shape)
