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
    assert not convert(there, "torch-batch")[1].restored  # It was already.
    there[3].scale = 3.0  # Not part of the code of a graph any more.


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in FOLLOWING])
def test_what_was_fused_in_a_graph_goes_back_into_the_graph(kind):
    class Tailed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(3)
            self.tail = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.end = nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.sigmoid(self.end(F.leaky_relu(self.tail(self.block(x)), 0.3)))

    model = fx.symbolic_trace(prepared(Tailed()))
    fused, report = convert(model)
    assert sum("+" in what for what in report.replaced.values()) == 4
    divisible = "group:1" if kind == "group:2" else kind
    there, report = convert(fused, divisible, example=X)
    assert report.restored == {"": "GraphModule"}
    direct, report = convert(model, divisible, example=X)
    assert not report.restored
    assert_close(outputs(there), outputs(direct))
    assert_close(outputs(convert(there, "batch")[0]), outputs(model))


@pytest.mark.parametrize(
    ("first", "second", "made", "returned"),
    [
        (
            "group:2",
            "sync",
            normlab.SyncBatchNorm,
            "running_mean, running_var, num_batches_tracked",
        ),
        ("none", "instance", nn.InstanceNorm2d, "weight, bias"),
        ("sync", "layer", nn.GroupNorm, None),
    ],
)
def test_what_a_layer_was_says_what_it_does_not_know_itself(first, second, made, returned):
    """Without an example: its running statistics, its channels, its dimensions."""
    model = prepared(nn.Sequential(nn.BatchNorm2d(4)))
    there, _ = convert(model, first)
    further, report = convert(there, second)
    assert type(further[0]) is made
    assert report.returned == ({"0": returned} if returned else {})
    known = model.state_dict()
    assert all(known[name].equal(value) for name, value in further.state_dict().items())
    back, report = convert(convert(further, "rms")[0], second)
    assert type(back[0]) is made
    assert not report.kept  # A step back puts nothing aside.


def test_what_becomes_torchs_has_nothing_of_normlabs():
    ours = normlab.BatchNorm2d(4, ghost_size=2, finite_guard=True)
    there, _ = convert(nn.Sequential(convert(ours)[0]), "torch-batch")
    torchs = nn.BatchNorm2d(4)
    public = [{name for name in vars(each) if name[0] != "_"} for each in (there[0], torchs)]
    assert public[0] == public[1]
    assert [*dict(there[0].named_buffers())] == [*dict(torchs.named_buffers())]


def test_a_process_group_goes_along():
    for start in (nn.SyncBatchNorm, normlab.SyncBatchNorm):
        model = nn.Sequential(start(4, process_group="mine"))
        for kind in ("sync", "torch-batch", "sync"):
            model, _ = convert(model, kind)
            assert model[0].process_group == "mine"


def test_a_synchronized_layer_of_torchs_gets_the_rank_of_ghosts_from_the_example():
    ghosts, _ = convert(nn.Sequential(nn.SyncBatchNorm(3)), "ghost:2", example=X)
    assert type(ghosts[0]) is normlab.BatchNorm2d
    assert ghosts[0].ghost_size == 2


def test_an_activation_after_one_that_a_layer_does_stays():
    model = prepared(nn.Sequential(normlab.BatchNorm2d(3, activation="silu"), nn.ReLU()))
    there, _ = convert(model, "ghost:2")
    assert outputs(there).equal(outputs(model))


def test_a_slope_goes_with_its_activation():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2))
    there, _ = convert(convert(model)[0], "layer")
    back, _ = convert(there, "batch", fuse=False)
    assert repr(back) == repr(convert(model, fuse=False)[0])


class Adding(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x, x.flip(0))


ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "sigmoid": F.sigmoid,
    "silu": F.silu,
}


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["torch-batch", "group:2", "layer", "instance", "rms", "none", "fit"]
)
def test_layers_of_every_rank_do_what_a_layer_did(kind, rank):
    if (kind, rank) == ("instance", 0):
        return  # There is none.
    ours = (*(normlab.BatchNorm1d, normlab.BatchNorm1d, normlab.BatchNorm2d, normlab.BatchNorm3d),)[
        rank
    ]
    x = torch.rand(4, 4, *[2] * rank)
    asked = {"to": "none", "calibrate": [x]} if kind == "fit" else {"to": kind, "example": x}
    bare, _ = convert(nn.Sequential(ours(4)), **asked)
    name = type(bare[0]).__name__
    for activation, function in ACTIVATIONS.items():
        model = Adding(ours(4, activation=activation, negative_slope=0.3))
        there, report = convert(model, **asked)
        assert_close(outputs(there, x), function(outputs(bare, x) + x.flip(0)))
        told = name if activation is None else f"{name} + {activation}"
        assert report.replaced["norm"].partition(" (was")[0] == told
        shown = [bare[0].extra_repr(), f"activation={activation!r}"]
        assert there.norm.extra_repr() == ", ".join(filter(None, shown))
        ghosts, _ = convert(there, "ghost:3")
        assert type(ghosts.norm) is ours
        assert outputs(ghosts, x).equal(outputs(model, x))


def test_torchs_synchronized_layer_does_what_normlabs_did():
    model = Adding(normlab.SyncBatchNorm(3, activation="silu"))
    there, report = convert(model, "torch-batch")
    assert report.replaced == {"norm": "SyncBatchNorm + silu"}
    assert isinstance(there.norm, nn.SyncBatchNorm)
    assert_close(outputs(there), outputs(model))


class Leaves(fx.Tracer):
    """Sees sequences as steps, and not what is in them."""

    def is_leaf_module(self, *_):
        return True


def test_what_a_sequence_did_in_a_graph_goes_back_into_the_graph():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
            self.nothing = nn.Sequential()

        def forward(self, x):
            return F.silu(self.body(self.nothing(self.head(x))))

    model = prepared(Shortcut())
    fused, report = convert(fx.GraphModule(model, Leaves().trace(model)))
    assert report.replaced == {"head.0": "BatchNorm2d + relu", "body.1.0": "BatchNorm2d + silu"}
    there, report = convert(fused, "layer")
    assert report.restored == {"": "GraphModule", "head.1": "ReLU"}
    assert_close(outputs(there), outputs(convert(model, "layer")[0]))


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
    assert back.first.num_batches_skipped == 0
    assert list(back.state_dict()) == list(model.state_dict())
    assert back.first.activation == "silu"
    assert outputs(back, x).equal(outputs(model, x))
    if kind not in FOLLOWING:
        tensors = {
            "torch-batch": "",
            "rms": "bias, running_mean, running_var, num_batches_tracked, ",
            "none": "weight, bias, running_mean, running_var, num_batches_tracked, ",
        }.get(kind, "running_mean, running_var, num_batches_tracked, ")
        assert report.kept["first"] == f"{tensors}num_batches_skipped, finite_guard"


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


def built(kind):
    """Two layers that no conversion made, so that nothing is remembered."""
    first, second = BETWEEN[kind]
    if first is nn.GroupNorm:
        groups = 1 if kind == "layer" else 2
        made = [nn.GroupNorm(groups, 4), nn.LayerNorm(4) if groups == 1 else nn.GroupNorm(2, 4)]
    else:
        made = [first(4), second(4)]
    if kind == "ghost:2":
        made[0].ghost_size = made[1].ghost_size = 2
    return prepared(nn.Sequential(made[0], nn.Flatten(), nn.Linear(16, 4), made[1]))


@pytest.mark.parametrize("start", BETWEEN)
@pytest.mark.parametrize("to", BETWEEN)
def test_from_each_to_each(start, to):
    model, x = built(start), torch.randn(4, 4, 2, 2)
    converted, report = convert(model, to, example=x)
    types = BETWEEN[to]
    if start == "sync" and to in ("batch", "torch-batch"):  # Each has a synchronized layer.
        types = ((nn if to == "torch-batch" else normlab).SyncBatchNorm,) * 2
    assert (type(converted[0]), type(converted[3])) == types
    already = start == to or (start, to) == ("sync", "batch")
    assert set(report.replaced) == (set() if already else {"0", "3"})
    assert getattr(converted[0], "ghost_size", None) == (2 if to == "ghost:2" else None)
    for i in (0, 3):
        assert converted[i].weight.equal(model[i].weight)
        if hasattr(converted[i], "bias") and hasattr(model[i], "bias"):
            assert converted[i].bias.equal(model[i].bias)
    if to != "torch-batch" or start != "sync":  # Which refuses tensors on a CPU.
        assert converted(x).shape == (4, 4)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("grop:8", r"unknown target 'grop:8': .* \(did you mean group:8\?\)"),
        ("ghost:0", "'ghost:0': expected the samples in a ghost batch, as in ghost:32"),
        ("ghost", "'ghost': expected the samples"),
        ("group:x", "'group:x': group norm wants its number of groups"),
        ("sync:2", "unknown target 'sync:2'"),
        (None, "unknown target None"),
    ],
    ids=str,
)
def test_unknown_kinds(to, message):
    with pytest.raises(InputError, match=message):
        convert(nn.ReLU(), to)


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


REFUSED = {
    "one value a channel": (
        flat(nn.BatchNorm1d(12)),
        "instance",
        "1: BatchNorm1d gets one value per channel and sample",
    ),
    "one position": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)),
        "instance",
        "1: BatchNorm2d gets one value per channel and sample",
    ),
    "one value a group": (flat(nn.BatchNorm1d(12)), "group:12", "1: group:12 on a layer of 12"),
    "one value a group at one position": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)),
        "group:3",
        "1: group:3 on a layer of 3",
    ),
    "not divided": (nn.Sequential(nn.BatchNorm2d(3)), "group:2", "0: group:2 does not divide"),
    "the model itself": (nn.BatchNorm2d(3), "group:2", "the model: group:2 does not divide"),
    "not called": (
        nn.ModuleDict({"unused": nn.BatchNorm1d(3)}),
        "layer",
        "unused: BatchNorm1d is not called",
    ),
    "not called, of the last axes": (
        nn.ModuleDict({"unused": nn.LayerNorm(3)}),
        "rms",
        "unused: LayerNorm is not called",
    ),
}


class Ignores(nn.ModuleDict):
    def forward(self, x):
        return x


@pytest.mark.parametrize(("model", "to", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_has_no_equivalent_is_named(model, to, message, inplace):
    if isinstance(model, nn.ModuleDict):
        model = Ignores(dict(model.items()))
    before = pickle.dumps(model)
    with pytest.raises(InputError, match=f"^{message}"):
        convert(model, to, example=torch.rand(2, 3, 2, 2), inplace=inplace)
    assert pickle.dumps(model) == before


@pytest.mark.parametrize(
    ("layer", "to"),
    [
        (nn.BatchNorm1d(4), "layer"),
        (nn.BatchNorm1d(4), "instance"),
        (nn.BatchNorm1d(4), "group:4"),
        (nn.SyncBatchNorm(4), "instance"),
        (nn.LayerNorm(4), "rms"),
        (nn.LayerNorm((4, 2)), "group:2"),
        (nn.GroupNorm(2, 4), "layer"),
    ],
    ids=str,
)
def test_where_an_example_is_needed_it_says_so(layer, to):
    message = rf"^0: {type(layer).__name__} may get \(N, C\) or more.*: pass example="
    with pytest.raises(InputError, match=message):
        convert(nn.Sequential(layer), to)


@pytest.mark.parametrize(
    ("layer", "to", "made"),
    [
        (nn.BatchNorm1d(4), "group:2", nn.GroupNorm),
        (nn.BatchNorm2d(4), "layer", nn.GroupNorm),
        (nn.BatchNorm3d(4), "instance", nn.InstanceNorm3d),
        (nn.BatchNorm1d(4), "rms", RMSNorm),
        (nn.BatchNorm1d(4), "none", nn.Identity),
        (nn.SyncBatchNorm(4), "group:4", None),
        (nn.LayerNorm(4), "none", nn.Identity),
        (nn.InstanceNorm2d(4), "group:4", nn.GroupNorm),
    ],
    ids=str,
)
def test_where_no_example_is_needed(layer, to, made):
    if made is None:
        with pytest.raises(InputError, match="pass example="):
            convert(nn.Sequential(layer), to)
    else:
        converted, report = convert(nn.Sequential(layer), to)
        assert type(converted[0]) is made
        assert report.error is None


def test_layers_that_never_were_batch_norms_become_some_only_with_an_example():
    model = prepared(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(3, 3), nn.InstanceNorm2d(3)))
    converted, report = convert(model)
    assert [type(each) for each in converted] == [
        normlab.BatchNorm2d,
        nn.GroupNorm,
        nn.InstanceNorm2d,
    ]
    why = "becomes a batch norm only with example=, an input of the network"
    assert report.skipped == {"1": f"GroupNorm {why}", "2": f"InstanceNorm2d {why}"}
    converted, report = convert(model, example=X)
    assert [type(each) for each in converted] == [normlab.BatchNorm2d] * 3
    assert report.error > 0


def test_layer_norms_over_the_last_axis_are_left():
    model = nn.Sequential(
        *(nn.BatchNorm2d(3), nn.LayerNorm(6), nn.LayerNorm((3, 6, 6))),
        *(nn.RMSNorm(6), nn.RMSNorm((3, 6, 6))),
    )
    converted, report = convert(model, "group:3", example=X)
    assert [type(each) for each in converted] == [
        *(nn.GroupNorm, nn.LayerNorm, nn.GroupNorm),
        *(nn.RMSNorm, nn.GroupNorm),
    ]
    assert report.skipped == {
        name: f"{kind} normalizes the last axes of (4, 3, 6, 6); the norms that could take its "
        "place have the channels on the second"
        for name, kind in (("1", "LayerNorm"), ("3", "RMSNorm"))
    }
    assert report.kept["2"] == "weight, bias"  # They are not per channel.
    assert report.kept["4"] == "weight"
    gone, report = convert(model, "none", example=X)
    assert [type(each) for each in gone] == [nn.Identity] * 5
    assert not report.skipped


class Twice(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_may_be_more_than_a_norm_is_left():
    model = nn.Sequential(Twice(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Softplus())
    model[3].extra = nn.Parameter(torch.ones(3))
    for kind in ("rms", "none"):
        _, report = convert(model, kind)
        assert not report.replaced
        assert report.skipped == {
            "0": "its class Twice has forward of its own",
            "1": "it has not seen a batch yet, and so knows no channels",
            "2": report.skipped["2"],
            "3": "it has extra of its own",
        }
        assert "of its own" in report.skipped["2"]
    _, report = convert(nn.Sequential(nn.LazyBatchNorm2d()), "sync")
    assert report.skipped == {"0": "it has not seen a batch yet, and so knows no channels"}


@pytest.mark.parametrize("kind", ["group:2", "layer", "rms"])
def test_inputs_without_positions_are_normalized_right(kind):
    model = prepared(nn.Sequential(nn.BatchNorm1d(4))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = convert(model, kind, example=x)[0](x)
    groups = x.view(3, 2, 2) if kind == "group:2" else x.view(3, 1, 4)
    mean = 0 if kind == "rms" else groups.mean(2, keepdim=True)
    normal = (groups - mean) / ((groups - mean).square().mean(2, keepdim=True) + 1e-5).sqrt()
    shift = 0 if kind == "rms" else model[0].bias
    assert_close(found, normal.view(3, 4) * model[0].weight + shift, rtol=1e-10, atol=1e-10)


def test_examples_as_a_loader_yields_them():
    model = nn.Sequential(nn.BatchNorm1d(3))
    for example in ((torch.rand(2, 3), "labels"), {"input": torch.rand(2, 3)}):
        assert type(convert(model, "layer", example=example)[0][0]) is nn.LayerNorm
    forward = lambda model, batch: model(batch["x"].flatten(1))  # noqa: E731
    example = {"x": torch.rand(2, 3, 1)}
    converted, _ = convert(model, "layer", example=example, forward=forward)
    assert type(converted[0]) is nn.LayerNorm
    with pytest.raises(InputError, match="a batch is a str"):
        convert(model, "layer", example="x")


class Counting(nn.Module):
    """Counts in a buffer, and draws."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls.add_(1)
        return self.norm(x) + torch.rand(())


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_else_changes(inplace):
    model = Counting().train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    converted, _ = convert(model, "layer", calibrate=[X, X], inplace=inplace)
    assert torch.get_rng_state().equal(state)
    assert (converted is model) == inplace
    assert converted.calls == 0
    assert all(each.training and not each._forward_pre_hooks for each in converted.modules())


@pytest.mark.parametrize("kind", ["group:2", "torch-batch"])
def test_a_failure_in_place_leaves_every_bit(kind):
    model, _ = convert(network())
    model.append(normlab.BatchNorm1d(6 if kind == "torch-batch" else 5))
    before, shown, hold = seen(model), pickle.dumps(model), model[1]
    calls = []

    def forward(each, batch):
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("mine")
        return each[:12](batch)

    with pytest.raises((InputError, KeyError)):
        convert(model, kind, example=X, forward=forward, inplace=True)
    assert model[1] is hold
    assert seen(model) == before
    assert pickle.dumps(model) == shown


def test_a_graph_is_put_back_after_a_failure():
    model, _ = convert(fx.symbolic_trace(prepared(Block(3))))
    before, code = outputs(model), model.code

    def forward(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        convert(model, "group:1", example=X, forward=forward, inplace=True)
    assert model.code == code
    with torch.no_grad():
        assert model.eval()(X).equal(before)  # A copy would be compiled anew.


def test_types_follow_on_the_way_back():
    model = prepared(nn.Sequential(nn.BatchNorm2d(4)))
    back, _ = convert(convert(model, "group:2")[0].double(), "torch-batch")
    assert back[0].running_mean.dtype == back[0].weight.dtype == torch.float64
    assert back[0].num_batches_tracked.dtype == torch.int64
    assert back[0].running_mean.float().equal(model[0].running_mean)
    half = nn.Sequential(normlab.BatchNorm2d(4, float32_statistics=True)).bfloat16()
    back, _ = convert(convert(half, "rms")[0], "batch")
    assert back[0].running_mean.dtype == torch.float32
    assert back[0].bias.dtype == torch.bfloat16


def test_what_comes_back_follows_the_layer_and_is_as_frozen():
    model = prepared(nn.Sequential(nn.BatchNorm2d(4)))
    model[0].bias.requires_grad_(False)
    there, _ = convert(model, "rms")
    back, _ = convert(there.double(), "torch-batch")
    assert isinstance(back[0].bias, nn.Parameter)
    assert not back[0].bias.requires_grad
    away, _ = convert(there.to("meta"), "torch-batch")
    assert all(value.is_meta for value in away.state_dict().values())
    x = torch.rand(2, 4, 3, 3)
    fit, _ = convert(model, "group:2", calibrate=[x])  # It has no tensor that was the model's.
    back, _ = convert(fit.double(), "torch-batch")
    assert back[0].weight.dtype == back[0].running_mean.dtype == torch.float64


def test_what_was_taken_away_in_between_stays_away():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].note = "mine"
    there, _ = convert(model, "group:2")
    del there[0].note, there[0].bias
    back, _ = convert(there, "torch-batch")
    assert not hasattr(back[0], "note")
    assert back[0].bias is None


def test_the_report_reads_well():
    model = network()
    _, report = convert(convert(model)[0], "none", example=X)
    lines = str(report).splitlines()
    assert lines[0] == "6 norm layers replaced; 0 left as they were"
    assert lines[1].startswith("  outputs changed by ")
    assert lines[2:4] == [
        "  1: Identity (was BatchNorm2d) (kept for the way back: weight, bias, running_mean, "
        "running_var, num_batches_tracked)",
        "  3.bn1: Identity (was BatchNorm2d) (kept for the way back: weight, bias, running_mean, "
        "running_var, num_batches_tracked)",
    ]
    assert lines[-1] == "  11: Sigmoid again"


def test_a_lazy_layer_does_not_come_back_as_what_it_no_longer_is():
    ours, _ = convert(nn.Sequential(nn.LazyBatchNorm2d()), "ghost:2")
    assert type(ours[0]) is normlab.LazyBatchNorm2d
    back, _ = convert(ours, "torch-batch")
    assert type(back[0]) is nn.LazyBatchNorm2d
    ours(X)
    back, _ = convert(ours, "torch-batch")
    assert type(back[0]) is nn.BatchNorm2d
    assert back(X).shape == X.shape
    assert back[0].num_batches_tracked == 1 + ours[0].num_batches_tracked
