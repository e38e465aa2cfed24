import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.layers import RMSNorm
from normlab.surgery import convert
from normlab.surgery.models import batch_norms

KINDS = ("torch-batch", "sync", "ghost:2", "group:2", "layer", "instance", "rms", "none")
FOLLOWING = ("sync", "ghost:2")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, momentum=None)
        self.scale = 2.0

    def forward(self, x):
        out = F.silu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x) * self.scale


def prepared(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            if each.is_floating_point():
                each += torch.rand(each.shape, generator=generator, dtype=each.dtype)
    return model


def network():
    """Batch norms with an activation, in a block, frozen, shared, tied, and with a hook."""
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        Block(4),
        shared,
        nn.Tanh(),
        shared,
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.Sigmoid(),
    )
    model[7].weight = model[1].weight
    model[7].bias.requires_grad_(False)
    model[7].eval()
    model[7].note = "mine"
    return prepared(model)


def outputs(model, x=X):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model(x)


def seen(model):
    """All that a way there and back must leave as it was, and more than the state dict has."""
    return {
        "repr": repr(model),
        "types": [type(each).__name__ for each in model.modules()],
        "modes": [each.training for each in model.modules()],
        "shared": [len(list(model.modules())), len(list(model.parameters()))],
        "gradients": [each.requires_grad for each in model.parameters()],
        "hooks": [len(each._forward_hooks) for each in model.modules()],
        "attributes": [sorted(vars(each)) for each in model.modules()],
        "buffers": [name for name, _ in model.named_buffers()],
    }


def assert_same(model, expected):
    assert seen(model) == seen(expected)
    state, other = model.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    assert all(state[name].equal(other[name]) for name in other)
    assert outputs(model).equal(outputs(expected))


class Calls:
    """A hook whose copies count for it."""

    def __init__(self):
        self.count = 0

    def __call__(self, *_):
        self.count += 1

    def __deepcopy__(self, memo):
        return self


def instance_ready(model, kind):
    """Instance norm has nothing to normalize after the linear layer."""
    if kind == "instance":
        model[10], model[11] = nn.Identity(), nn.Identity()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_there_and_back(kind, fuse):
    model = instance_ready(network(), kind)
    calls = Calls()
    model[7].register_forward_hook(calls)
    batch, _ = convert(model, fuse=fuse)
    there, report = convert(batch, kind, fuse=fuse, example=X)
    assert set(report.replaced) == set(batch_norms(batch))
    assert not report.skipped
    assert copy.deepcopy(there)(X).isfinite().all()  # Training would move running statistics.
    assert calls.count
    assert there[4] is there[6]
    back, _ = convert(there, "batch", fuse=fuse)
    assert_same(back, batch)
    assert_close(outputs(batch), outputs(model))
    assert back[7].note == there[7].note == "mine"
    assert back[1].weight is back[7].weight


@pytest.mark.parametrize("kind", [each for each in KINDS if each != "torch-batch"])
def test_there_and_back_from_torchs_own(kind):
    model = instance_ready(network(), kind)
    there, _ = convert(model, kind, example=X)
    back, report = convert(there, "torch-batch")
    assert_same(back, model)
    assert set(report.replaced.values()) == {
        f"{name} (was {was})" if name != was else name
        for layer, new in zip(model.modules(), there.modules(), strict=True)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        for name, was in [(type(layer).__name__, type(new).__name__)]
    }


def test_a_long_way_round():
    model = instance_ready(network(), "instance")
    batch, _ = convert(model)
    round_trip = batch
    for kind in ("ghost:2", "group:2", "sync", "rms", "none", "torch-batch", "layer", "instance"):
        round_trip, _ = convert(round_trip, kind, example=X)
    back, _ = convert(round_trip, "batch")
    state = back.state_dict()
    assert list(state) == list(batch.state_dict())
    assert all(state[name].equal(value) for name, value in batch.state_dict().items())
    assert seen(back) == seen(batch)
    assert outputs(back).equal(outputs(batch))


def test_what_was_trained_in_between_comes_along():
    model = prepared(nn.Sequential(nn.BatchNorm2d(4)))
    there, report = convert(model, "group:2")
    assert report.kept == {"0": "running_mean, running_var, num_batches_tracked"}
    with torch.no_grad():
        there[0].weight.fill_(7)
    back, report = convert(there, "torch-batch")
    assert back[0].weight.tolist() == [7] * 4
    assert back[0].running_mean.equal(model[0].running_mean)
    assert report.returned == report.kept | {"0": "running_mean, running_var, num_batches_tracked"}
    assert "statistics perhaps stale" in str(report)
    there, report = convert(model, "rms")
    assert report.kept == {"0": "bias, running_mean, running_var, num_batches_tracked"}


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in FOLLOWING])
def test_what_was_fused_is_done_by_the_modules_that_did_it_before(kind):
    model = instance_ready(network(), kind)
    fused, _ = convert(model)
    assert [type(fused[i]) for i in (2, 11)] == [nn.Identity] * 2
    there, report = convert(fused, kind, example=X)
    direct, _ = convert(model, kind, example=X)
    assert type(there[2]) is nn.LeakyReLU
    assert type(there[3]) is Block
    assert there[2].negative_slope == 0.2
    assert report.restored["3"] == "Block"
    assert report.restored["2"] == "LeakyReLU"
    assert outputs(there).equal(outputs(direct))
    there[3].scale = 3.0  # Not part of the code of a graph any more.


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in FOLLOWING])
def test_what_was_fused_in_a_graph_goes_back_into_the_graph(kind):
    class Tailed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(3)
            self.tail = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return F.leaky_relu(self.tail(self.block(x)), 0.3)

    model = fx.symbolic_trace(prepared(Tailed()))
    fused, report = convert(model)
    assert sum("+" in what for what in report.replaced.values()) == 3
    divisible = "group:1" if kind == "group:2" else kind
    there, _ = convert(fused, divisible, example=X)
    direct, _ = convert(model, divisible, example=X)
    assert_close(outputs(there), outputs(direct))
    assert_close(outputs(convert(there, "batch")[0]), outputs(model))


class Residual(nn.Module):
    """Is built with normlab's layers, which do what follows."""

    def __init__(self):
        super().__init__()
        self.first = normlab.BatchNorm2d(4, activation="silu", finite_guard=True)
        self.second = normlab.BatchNorm2d(4, activation="relu", ghost_size=3)

    def forward(self, x):
        return self.second(self.first(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_that_a_layer_was_built_with_stays(kind):
    x = torch.randn(4, 4, 5, 5)
    model = prepared(Residual())
    there, report = convert(model, kind, example=x)
    assert "+ silu" in report.replaced["first"]
    bare = copy.deepcopy(model)
    bare.first.activation = bare.second.activation = None
    bare, _ = convert(bare, kind, example=x)
    inner = F.silu(bare.first.eval()(x))
    with torch.no_grad():
        expected = F.relu(bare.second.eval()(inner) + x)
    assert_close(outputs(there, x), expected)
    for way in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), saved):
        assert outputs(way(there), x).equal(outputs(there, x))
    back, _ = convert(convert(there, "batch")[0], "ghost:3")
    assert back.second.ghost_size == 3
    assert back.first.finite_guard
    assert back.first.activation == "silu"
    assert outputs(back, x).equal(outputs(model, x))
    if kind not in FOLLOWING:
        assert "finite_guard" in report.kept["first"]


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


BETWEEN = {
    "batch": (normlab.BatchNorm2d, normlab.BatchNorm1d),
    "torch-batch": (nn.BatchNorm2d, nn.BatchNorm1d),
    "sync": (normlab.SyncBatchNorm, normlab.SyncBatchNorm),
    "ghost:2": (normlab.BatchNorm2d, normlab.BatchNorm1d),
    "group:2": (nn.GroupNorm, nn.GroupNorm),
    "layer": (nn.GroupNorm, nn.LayerNorm),
    "rms": (RMSNorm, RMSNorm),
}


@pytest.mark.parametrize("start", BETWEEN)
@pytest.mark.parametrize("to", BETWEEN)
def test_from_each_to_each(start, to):
    """Built by torch, not by a conversion, so that nothing is remembered."""
    first, second = (cls(*_arguments(cls, 4)) for cls in BETWEEN[start])
    if start == "ghost:2":
        first.ghost_size = second.ghost_size = 2
    model = prepared(nn.Sequential(first, nn.Flatten(), nn.Linear(16, 4), second))
    x = torch.randn(3, 4, 2, 2)
    converted, report = convert(model, to, example=x)
    assert converted(x).shape == (3, 4)
    alike = {start, to} in ({"batch", "sync"}, {"layer", "rms"})
    if start != to and not (start == "sync" and to == "batch"):
        kinds = (nn.SyncBatchNorm,) * 2 if (start, to) == ("sync", "torch-batch") else BETWEEN[to]
        assert tuple(type(converted[i]) for i in (0, 3)) == kinds
        assert set(report.replaced) == {"0", "3"}
    assert converted[0].weight.equal(model[0].weight)
    if alike or getattr(converted[0], "bias", None) is not None is not getattr(first, "bias", None):
        assert converted[0].bias.equal(first.bias)


def _arguments(cls, channels):
    return (2, channels) if cls is nn.GroupNorm else (channels,)
