import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.surgery import adapt, freeze, recalibrate, unfreeze

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SAME = {"rtol": 0, "atol": 0}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.BatchNorm1d(3), nn.Linear(3, 4), normlab.BatchNorm1d(4, activation="relu"))
    model = nn.Sequential(*layers, nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for each in (model[0], model[2]):
            each.running_mean += 3
            each.running_var *= 9
            each.num_batches_tracked += 70
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_true_statistics(layer, data, **tolerance):
    """Of all values of the data, which the layer gets, in float64."""
    data = data.double()
    mean = data.sum(0) / len(data)
    var = (data - mean).square().sum(0) / (len(data) - 1)
    assert_close(layer.running_mean.double(), mean, **(tolerance or EXACT))
    assert_close(layer.running_var.double(), var, **(tolerance or EXACT))


# ------------------------------------------------------------------------ beside update_bn


def unequal():
    return [randn(100, 3), 5 + randn(2, 3, seed=1)]


def test_unequal_batches_weigh_by_their_values():
    model, report = recalibrate(network(), unequal())
    assert_true_statistics(model[0], torch.cat(unequal()))
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 2
    assert report.layers["0"].samples == report.layers["0"].count == 102
    theirs = network()
    update_bn(unequal(), theirs)
    assert (theirs[0].running_mean - model[0].running_mean).min() > 2  # As if it were half.


def test_a_mean_far_above_the_deviation():
    batches = [(1e4 + 1e-2 * randn(64, 3, seed=seed)).float() for seed in range(20)]
    data = torch.cat(batches)
    model, _ = recalibrate(network().float(), batches)
    assert_true_statistics(model[0], data, rtol=1e-7, atol=0)
    # The nearest float32 is at most 4.9e-4 away; a moving average in float32 goes farther.
    mean, var = data.double().mean(0), data.double().var(0)
    assert (model[0].running_mean - mean).abs().max() < 4.9e-4
    theirs = network().float()
    update_bn(batches, theirs)
    assert (theirs[0].running_mean - mean).abs().max() > 1e-3
    assert (theirs[0].running_var / var - 1).abs().max() > 5e-3
    wide = [(1e4 + seed + 1e-2 * randn(64, 3, seed=seed)).float() for seed in range(20)]
    model, _ = recalibrate(network().float(), wide)
    assert_true_statistics(model[0], torch.cat(wide), rtol=1e-7, atol=0)
    update_bn(wide, theirs)
    assert theirs[0].running_var.max() < 1e-3  # What lies between batches is not there: 35.


@pytest.mark.parametrize("how", ["freeze", "eval"])
def test_frozen_layers_stay(how):
    model = network()
    if how == "freeze":
        freeze(model[0], inplace=True)
    else:
        model[0].eval()
    recalibrated, report = recalibrate(model, unequal())
    assert_close(state(recalibrated[0]), state(model[0]), **SAME)
    assert report.left == {
        "0": "it is frozen"
        if how == "freeze"
        else "it is in eval mode while the model is in training mode"
    }
    # What comes after gets what the frozen layer makes.
    assert_true_statistics(
        recalibrated[2], model[1](model[0].eval()(torch.cat(unequal()))).detach()
    )
    update_bn(unequal(), model)
    # It moves the one, and resets the other, which then stays so.
    assert model[0].num_batches_tracked == (0 if how == "freeze" else 2)
    assert model[0].running_mean.max() < 3


def test_a_model_in_eval_mode_has_no_frozen_layers_by_that():
    model, report = recalibrate(network().eval(), unequal())
    assert list(report.layers) == ["0", "2"]
    assert not any(each.training for each in model.modules())


def failing(model, batch):
    model(batch)
    if len(batch) == 3:
        raise OSError("broken")


@pytest.mark.parametrize("operation", [recalibrate, adapt])
def test_an_error_in_the_middle_leaves_all_as_it_was(operation):
    model = network()
    model[2].eval()
    before, modes = state(model), [each.training for each in model.modules()]
    batches = [randn(n, 3, seed=n) for n in (5, 4, 3, 2)]
    with pytest.raises(OSError, match="broken"):
        operation(model, batches, forward=failing, inplace=True)
    assert_close(state(model), before, **SAME)
    assert [each.training for each in model.modules()] == modes
    assert not any(each._forward_pre_hooks for each in model.modules())
    assert model[0].momentum == 0.1

    class Loader(list):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        update_bn(Loader(batches), model)
    assert model[0].momentum is None
    assert model[2].training


def test_an_error_in_the_second_pass_leaves_all_as_it_was():
    model = network()
    before = state(model)

    def forward(model, batch):
        model(batch)
        if not model[0].training:
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        recalibrate(model, unequal(), forward=forward, inplace=True)
    assert_close(state(model), before, **SAME)


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, "labels"), None),
        (lambda x: [x], None),
        (lambda x: {"input": x}, None),
        (lambda x: {"image": x}, lambda model, batch: model(batch["image"])),
    ],
    ids=["tensor", "tuple", "list", "dict", "forward"],
)
def test_batches_of_any_structure(batch, forward):
    class Network(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    model = Network(*network())
    batches = [batch(each) for each in unequal()]
    recalibrated, _ = recalibrate(model, batches, forward=forward)
    assert_true_statistics(recalibrated[0], torch.cat(unequal()))
    if isinstance(batches[0], dict):
        with pytest.raises((AttributeError, TypeError)):
            update_bn(batches, model)


# ----------------------------------------------------------------------------- what is done


def test_a_copy_is_changed_unless_the_model_itself_is_asked_for():
    model = network()
    before = state(model)
    copied, _ = recalibrate(model, unequal())
    assert copied is not model
    assert_close(state(model), before, **SAME)
    buffers = dict(model.named_buffers())
    same, _ = recalibrate(model, unequal(), inplace=True)
    assert same is model
    assert_close(state(model), state(copied), **SAME)
    assert all(buffers[name] is each for name, each in model.named_buffers())
    assert all(each.training for each in model.modules())


def drift(layer, mean, var, batch_mean, batch_var):
    """By its definition: the 95th percentile and the largest z, the largest v."""
    z = (mean - batch_mean).abs() / (batch_var + layer.eps).sqrt()
    v = ((var + layer.eps).log() - (batch_var + layer.eps).log()).abs()
    z, order = z.sort().values, 0.95 * (len(z) - 1)
    low, part = int(order), order - int(order)
    return [
        (z[low] * (1 - part) + z[math.ceil(order)] * part).item(),
        z.max().item(),
        v.max().item(),
    ]


def test_the_report_says_how_far_it_was_and_is():
    model = network()
    batches = [randn(8, 3, seed=seed) + seed for seed in range(3)]
    recalibrated, report = recalibrate(model, batches)
    assert list(report.layers) == ["0", "2"]
    inputs = [model[1](recalibrated[0].eval()(each)) for each in batches]
    recalibrated.train()
    with torch.no_grad():
        for name, data in (("0", torch.cat(batches)), ("2", torch.cat(inputs))):
            old, new, found = model[int(name)], recalibrated[int(name)], report.layers[name]
            estimated = (new.running_mean, new.running_var)
            before = drift(new, old.running_mean, old.running_var, *estimated)
            assert_close(list(vars(found.before).values()), before, **EXACT)
            after = drift(new, *estimated, data.mean(0), data.var(0))
            assert_close(list(vars(found.after).values()), after, **EXACT)
    assert report.layers["0"].after.z < 1e-12
    # Batches differ, so that the second layer gets something else in eval mode.
    assert report.layers["2"].after.v > 0.1
    frame = report.frame().set_index("layer")
    assert frame.loc["2", "v_after"] == report.layers["2"].after.v
    assert frame.loc["0", "z95_before"] == report.layers["0"].before.z95
    assert frame.loc["0", ["batches", "samples", "count", "weight"]].tolist() == [3, 24, 24, 1]
    lines = str(report).splitlines()
    assert lines[0] == "2 batch norm layers recalibrated over 3 batches; 0 left as they were"
    assert lines[1].startswith("  0: 24 samples; before z ")


def test_batches_that_end_cannot_be_gone_through_again():
    model, report = recalibrate(network(), iter(unequal()))
    assert_close(state(model), state(recalibrate(network(), unequal())[0]), **SAME)
    assert report.layers["0"].after is None
    assert report.frame()["z_after"].isna().all()
    assert ", after" not in str(report)


def test_the_second_pass_ends_where_the_first_did():
    batches = [randn(8, 3, seed=seed) for seed in range(12)]
    seen = []
    _, report = recalibrate(
        network(),
        batches,
        tolerance=10.0,
        forward=lambda model, batch: (seen.append(1), model(batch)),
    )
    assert report.stopped_early
    assert (report.batches, len(seen)) == (8, 16)
    assert "over 8 batches, the tolerance met; " in str(report)


def test_what_is_left_is_named():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stateless = nn.BatchNorm1d(3, track_running_stats=False)
            self.unused = nn.BatchNorm1d(3)
            self.guarded = normlab.BatchNorm1d(3, finite_guard=True)
            self.used = normlab.BatchNorm1d(3, finite_guard=True)
            self.number = 0

        def forward(self, x):
            self.used(self.stateless(x))
            self.guarded(x * torch.nan)

    model, report = recalibrate(Network().double(), unequal())
    assert report.left == {
        "stateless": "it has no running statistics",
        "unused": "it was not called",
        "guarded": "no batch was finite",
    }
    assert list(report.layers) == ["used"]
    assert report.skipped == {"guarded": 2}
    assert_close(state(model.guarded), state(Network().double().guarded), **SAME)
    assert model.guarded.num_batches_skipped == 0
    assert "  unused: left, it was not called" in str(report)


def test_skipped_batches_are_told():
    batches = [*unequal(), torch.full((4, 3), torch.nan).double()]
    model, report = recalibrate(normlab.BatchNorm1d(3, finite_guard=True).double(), iter(batches))
    assert_true_statistics(model, torch.cat(unequal()))
    assert model.num_batches_tracked == 2
    assert "the model: 102 samples, 1 batches skipped; before" in str(report)


def test_statistics_that_were_ruined_are_mended():
    model = network()
    model[0].running_mean.fill_(torch.nan)
    mended, report = recalibrate(model, unequal())
    assert_true_statistics(mended[0], torch.cat(unequal()))
    assert math.isnan(report.layers["0"].before.z)
    with pytest.raises(InputError, match="0: running_mean is not finite, so recalibrate it"):
        adapt(model, unequal())


def test_a_model_without_batch_norm_is_returned():
    model, report = recalibrate(nn.Sequential(nn.Linear(3, 3)), unequal())
    assert report.layers == report.left == {}
    assert report.frame().empty
    assert isinstance(model[0], nn.Linear)


def test_statistics_that_do_not_fit_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(3).half())
    before = state(model)
    batches = [(1000 * randn(8, 3)).half()]
    message = r"0: running_var reaches \d\.\d+e\+06, beyond torch.float16: keep"
    with pytest.raises(InputError, match=message):
        recalibrate(model, batches, inplace=True)
    assert_close(state(model), before, **SAME)
    wide = normlab.BatchNorm1d(3, float32_statistics=True).half()
    recalibrated, _ = recalibrate(wide, batches)
    assert_true_statistics(recalibrated, batches[0], rtol=1e-6, atol=0)


def test_a_single_value_is_refused():
    layer = normlab.BatchNorm1d(1)
    batch = {"input": torch.ones(2, 1), "mask": torch.tensor([True, False])}
    with pytest.raises(InputError, match="the model: got a single value per channel in all"):
        recalibrate(layer, [batch])
    recalibrated, _ = recalibrate(layer, [batch, batch])
    assert recalibrated.running_var == 0


def test_a_channel_without_variance_is_no_alarm():
    batch = randn(8, 3)
    batch[:, 1] = 0
    model, report = recalibrate(nn.BatchNorm1d(3).double(), [batch])
    assert model.running_var[1] == 0
    assert report.layers[""].after.v == 0
    again = recalibrate(model, [batch])[1].layers[""]
    assert again.before.v == 0


# ------------------------------------------------------------------------------- adaptation


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(None, 102 / 118), (0.25, 0.25), (0, 0), (1, 1), (lambda n: 1 / n, 1 / 102)],
)
def test_statistics_move_by_their_weight(weight, expected):
    model = network()
    adapted, report = adapt(model, unequal(), weight)
    estimated, _ = recalibrate(model, unequal())
    for i in (0, 2):
        for name in ("running_mean", "running_var"):
            old, new = getattr(model[i], name), getattr(estimated[i], name)
            assert_close(getattr(adapted[i], name), old + expected * (new - old), **EXACT)
        assert adapted[i].num_batches_tracked == 70
        assert report.layers[str(i)].weight == expected
    same, _ = adapt(model, unequal(), weight, inplace=True)
    assert same is model
    assert_close(state(model), state(adapted), **SAME)


def test_the_report_of_an_adaptation_says_what_it_weighed():
    _, report = adapt(network(), unequal(), 0.25)
    assert str(report).startswith("2 batch norm layers adapted over ")
    assert str(report).count(", weight 0.25; before ") == 2
    assert "weight" not in str(recalibrate(network(), unequal())[1])


def test_the_drift_after_adaptation_is_that_of_what_it_was_adapted_to():
    model = network()
    adapted, report = adapt(model, unequal(), 0.5)
    data, layer = torch.cat(unequal()), report.layers["0"]
    expected = drift(
        model[0], adapted[0].running_mean, adapted[0].running_var, data.mean(0), data.var(0)
    )
    assert_close(list(vars(layer.after).values()), expected, **EXACT)
    assert layer.after.z == pytest.approx(layer.before.z / 2)


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan, lambda _: 2])
def test_a_weight_is_from_0_to_1(weight):
    model = network()
    before = state(model)
    with pytest.raises(InputError, match="expected a weight from 0 to 1, got "):
        adapt(model, unequal(), weight, inplace=True)
    assert_close(state(model), before, **SAME)


def test_a_wrong_weight_is_told_before_anything_is_run():
    with pytest.raises(InputError, match=r"expected a weight from 0 to 1, got 2$"):
        adapt(network(), [], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_networks_of_timms(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    layers = {key: each for key, each in model.named_modules() if hasattr(each, "running_var")}
    batches = [randn(4, 3, 64, 64, seed=seed, dtype=torch.float32) for seed in range(3)]
    inputs = []
    first = next(iter(layers))
    model.get_submodule(first).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    recalibrated, report = recalibrate(model, iter(batches))
    assert list(report.layers) == list(layers)
    flat = torch.cat(inputs).movedim(1, -1).flatten(0, -2)
    assert_true_statistics(recalibrated.get_submodule(first), flat, rtol=1e-6, atol=1e-7)
    frozen, done = freeze(recalibrated)
    assert list(done.changed) == list(layers)
    before = {key: each.clone() for key, each in frozen.named_buffers()}
    frozen.train()(batches[0])
    assert_close(dict(frozen.named_buffers()), before, **SAME)
    assert not any(each.training for key, each in frozen.named_modules() if key in layers)
    thawed, _ = unfreeze(frozen)
    assert all(each.training for each in thawed.modules())


def test_the_functions_are_normlabs_own():
    assert normlab.recalibrate is recalibrate
    assert normlab.adapt is adapt
