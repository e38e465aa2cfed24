import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.surgery import freeze, is_frozen, unfreeze

SAME = {"rtol": 0, "atol": 0}


class Foreign(nn.BatchNorm1d):
    """A subclass with a forward pass, a `train` and a module of its own."""

    def __init__(self, features):
        super().__init__(features)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(1, 1)
        self.calls = []

    def train(self, mode=True):
        self.calls.append(mode)
        return super().train(mode)

    def forward(self, x):
        return self.drop(super().forward(x)).relu()


CLASSES = [nn.BatchNorm1d, normlab.BatchNorm1d, normlab.SyncBatchNorm, nn.SyncBatchNorm, Foreign]
each_class = pytest.mark.parametrize("constructor", CLASSES)


def network(constructor=nn.BatchNorm1d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), constructor(3), nn.Sequential(nn.BatchNorm1d(3)))
    for each in (model[1], model[2][0]):
        each.running_mean.fill_(0.5)
        each.running_var.fill_(4.0)
    return model


def x(seed=0):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_holds(model):
    """Its statistics stay, and it normalizes by them, whatever it is told."""
    before = buffers(model)
    for tell in (model.train, model.eval, lambda: model.train(False), lambda: model.train(True)):
        tell()
        layer = model[1]
        assert not layer.training
        inputs = model[0](x()).detach()
        expected = (
            (inputs - layer.running_mean) * (layer.running_var + layer.eps) ** -0.5
        ).detach()
        expected = expected * layer.weight + layer.bias
        for child in layer.modules():
            child.training = False  # The foreign layer's dropout.
        actual = layer(inputs)
        assert_close(actual, expected.relu() if isinstance(layer, Foreign) else expected)
        model(x(1))
        assert_close(buffers(model), before, **SAME)


@each_class
def test_frozen_statistics_stay_whatever_train_is_told(constructor):
    model = network(constructor)
    frozen, report = freeze(model, "statistics")
    assert report.changed == {"1": ["statistics"], "2.0": ["statistics"]}
    assert report.left == {}
    assert type(frozen[1]) is constructor
    assert list(frozen.state_dict()) == list(model.state_dict())
    assert all(each.requires_grad for each in frozen.parameters())
    assert frozen[1].train() is frozen[1]
    assert_holds(frozen)
    assert frozen.train().training
    assert frozen[2].training
    assert not is_frozen(model[1])
    assert model[1].training
    model(x())
    assert not model[1].running_mean.equal(frozen[1].running_mean)


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@each_class
def test_copies_are_frozen_for_themselves(constructor, through):
    frozen, _ = freeze(network(constructor))
    other = through(frozen)
    assert is_frozen(other[1])
    assert_holds(other)
    assert not other[1].weight.requires_grad
    thawed, _ = unfreeze(other, inplace=True)
    assert thawed is other
    assert other[1].training
    assert not is_frozen(other[1])
    assert is_frozen(frozen[1])
    assert not frozen[1].training
    assert_holds(frozen)


def test_a_state_dict_can_be_loaded_and_thaws_nothing():
    frozen, _ = freeze(network())
    other = network()
    other[1].running_mean.fill_(7)
    other[1].weight.data.fill_(3)
    frozen.load_state_dict(other.state_dict())
    assert frozen[1].running_mean.tolist() == [7] * 3
    assert frozen[1].weight.tolist() == [3] * 3
    assert not frozen[1].weight.requires_grad
    assert_holds(frozen)
    network().load_state_dict(frozen.state_dict())


def test_a_frozen_network_trains_the_rest():
    frozen, _ = freeze(network())
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(frozen.state_dict())
    frozen.train()(x()).square().sum().backward()
    optimizer.step()
    moved = [name for name, value in frozen.state_dict().items() if not value.equal(before[name])]
    assert moved == ["0.weight", "0.bias"]


@pytest.mark.parametrize("which", ["statistics", "parameters", "all"])
def test_only_what_was_asked_for_is_frozen(which):
    frozen, report = freeze(network(), which)
    assert is_frozen(frozen[1]) == (which != "parameters")
    assert frozen[1].weight.requires_grad == frozen[1].bias.requires_grad == (which == "statistics")
    assert frozen[0].weight.requires_grad
    statistics = ["statistics"] * (which != "parameters")
    assert report.changed["1"] == statistics + ["weight", "bias"] * (which != "statistics")


def test_what_is_not_unfrozen_stays_frozen():
    frozen, _ = freeze(network())
    part, report = unfreeze(frozen, "statistics")
    assert report.changed["1"] == ["statistics"]
    assert part[1].training
    assert not part[1].weight.requires_grad
    part, report = unfreeze(frozen, "parameters")
    assert report.changed["1"] == ["weight", "bias"]
    assert is_frozen(part[1])
    assert part[1].weight.requires_grad


def visible(model):
    """All of a model that freezing may touch."""
    return [
        (name, module.training, sorted(vars(module))) for name, module in model.named_modules()
    ] + [(name, each.requires_grad) for name, each in model.named_parameters()]


def mixed():
    model = network()
    model[1].bias.requires_grad_(False)
    model[2][0].eval()
    return model


def test_unfreezing_gives_back_what_there_was():
    model = mixed()
    for rounds in (1, 2):
        frozen = model
        for _ in range(rounds):
            frozen, report = freeze(frozen)
        assert bool(report.left) == (rounds == 2)
        thawed, _ = unfreeze(frozen)
        assert visible(thawed) == visible(model)
        assert visible(frozen) != visible(model)
        assert type(thawed[1]).train is vars(nn.Module)["train"]
        assert "train" not in vars(thawed[1])


@pytest.mark.parametrize("told", [[], [False], [True], [False, True], [True, False]])
def test_a_thawed_layer_is_in_the_mode_that_it_would_be_in(told):
    model, (frozen, _) = mixed(), freeze(mixed())
    for mode in told:
        model.train(mode)
        frozen.train(mode)
    assert visible(unfreeze(frozen)[0]) == visible(model)


def test_the_rest_of_a_foreign_layer_is_not_frozen():
    frozen, _ = freeze(network(Foreign))
    frozen.eval()
    frozen.train()
    assert frozen[1].calls == [False, True]
    assert frozen[1].drop.training
    assert not frozen[1].training
    assert frozen[1].unused.weight.requires_grad
    frozen[1].unused.weight.requires_grad_(False)
    assert not unfreeze(frozen)[0][1].unused.weight.requires_grad


def test_a_train_that_an_object_had_of_its_own_comes_back():
    model = network()
    calls = []
    model[1].train = calls.append
    freeze(model, inplace=True)
    model.eval()
    assert calls == [False]
    assert_holds(model)
    unfreeze(model, inplace=True)
    assert model[1].train == calls.append
    assert model[1].training  # As it would be: this `train` changes nothing.


def test_parameters_that_came_or_went_since_are_no_matter():
    frozen, _ = freeze(nn.BatchNorm1d(3))
    frozen.bias = None
    frozen.register_parameter("extra", nn.Parameter(torch.ones(3), requires_grad=False))
    thawed, report = unfreeze(frozen)
    assert report.changed == {"": ["statistics", "weight"]}
    assert not thawed.extra.requires_grad


def test_a_parameter_that_layers_share_is_given_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    thawed, _ = unfreeze(freeze(model)[0])
    assert thawed[0].weight.requires_grad
    assert thawed[1].weight is thawed[0].weight


def test_what_cannot_be_frozen_is_named():
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3, affine=False),
        nn.LazyBatchNorm1d(),
        nn.BatchNorm1d(3),
    )
    frozen, report = freeze(model)
    assert report.changed == {
        "0": ["weight", "bias"],
        "1": ["statistics"],
        "3": ["statistics", "weight", "bias"],
    }
    assert report.left == {
        "0": "it has no running statistics",
        "1": "it has no parameters",
        "2": "it has no running statistics before its first batch; "
        "it has no parameters before its first batch",
    }
    assert "  0: left, it has no running statistics" in str(report)
    alone = freeze(nn.BatchNorm1d(3, track_running_stats=False))[1]
    assert str(alone).splitlines()[1:] == [
        "  the model: weight, bias",
        "  the model: left, it has no running statistics",
    ]
    again = freeze(frozen)[1]
    assert again.changed == {}
    assert again.left["3"] == "its statistics are frozen already; its parameters are frozen already"
    thawed = unfreeze(frozen)[1]
    assert thawed.left["0"] == "its statistics are not frozen"
    assert unfreeze(model)[1].changed == {}


def test_a_mode_that_is_none_is_refused_and_changes_nothing():
    frozen, _ = freeze(network())
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        frozen[1].train("yes")
    assert not frozen[1].training
    assert unfreeze(frozen)[0][1].training


@pytest.mark.parametrize("operation", [freeze, unfreeze])
def test_unknown_parts_are_refused(operation):
    with pytest.raises(InputError, match=r"unknown part 'statistic': .*did you mean statistics\?"):
        operation(network(), "statistic")
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got int"):
        operation(3)


def test_it_is_frozen_in_compiled_and_traced_code():
    frozen, _ = freeze(network())
    frozen.train()
    expected, before = frozen(x()), buffers(frozen)
    compiled = torch.compile(frozen, backend="eager", fullgraph=True)
    assert_close(compiled(x()), expected, **SAME)
    compiled.train()
    assert_close(compiled(x()), expected, **SAME)
    traced = torch.fx.symbolic_trace(frozen)
    assert_close(traced.train()(x()), expected, **SAME)
    assert_close(buffers(frozen), before, **SAME)


def test_a_converted_network_is_as_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    converted, _ = normlab.convert(freeze(model)[0])
    assert type(converted[1]) is normlab.BatchNorm1d
    assert converted[1].activation == "relu"
    assert is_frozen(converted[1])
    before = buffers(converted)
    converted.train()(x())
    assert_close(buffers(converted), before, **SAME)
    thawed = unfreeze(converted)[0]
    assert thawed[1].training
    assert thawed[1].weight.requires_grad


def test_the_functions_are_normlabs_own():
    assert normlab.freeze is freeze
    assert normlab.unfreeze is unfreeze
