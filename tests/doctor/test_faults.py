"""Faults planted in a trained LeNet: each is found by its name, and mended where it can be."""

import copy

import pytest
import torch
from torch import nn

import normlab
from normlab import diagnose

from .conftest import draw, train

NAN = float("nan")


def heavy(diagnosis):
    return {
        (each.signal, each.layer): each.weight
        for each in diagnosis.findings
        if each.weight != "information"
    }


def planted(model, plant):
    model = copy.deepcopy(model)
    with torch.no_grad():
        plant(model)
    return model


def set_momentum(value):
    return lambda model: setattr(model.conv1.norm, "momentum", value)


def shift_mean(model):
    model.conv1.norm.running_mean += 2 * model.conv1.norm.running_var.sqrt()


def nan_in(name):
    return lambda model: getattr(model.conv1.norm, name)[2:3].fill_(NAN)


def constant_inputs(model):
    model.hidden0.linear.weight[:3] = 0
    model.hidden0.norm.running_var[:3] = 0
    model.hidden0.norm.running_mean[:3] = model.hidden0.linear.bias[:3]


def kill(model):
    model.hidden0.norm.bias[:60] = -10


def collapse(model):
    model.hidden0.norm.weight[:60] *= 1e-4
    model.hidden0.norm.bias[:60] = 1


RECALIBRATE = "model, report = normlab.recalibrate(model, batches)"

# What is planted; the signal, the layer, its weight; how the fix begins; whether fixed() mends it.
FAULTS = {
    "running mean": (
        *(shift_mean, "stale statistics", "conv1.norm", "error"),
        *(RECALIBRATE, True),
    ),
    "running variance": (
        *(lambda model: model.hidden0.norm.running_var.mul_(3), "stale statistics", "hidden0.norm"),
        *("warning", RECALIBRATE, True),
    ),
    "nan in statistics": (
        *(nan_in("running_mean"), "not finite", "conv1.norm", "error"),
        *(RECALIBRATE, True),
    ),
    "negative variance": (
        *(lambda model: model.conv1.norm.running_var[:1].neg_(), "not finite", "conv1.norm"),
        *("error", RECALIBRATE, True),
    ),
    "nan in γ": (
        *(nan_in("weight"), "not finite", "conv1.norm", "error"),
        *("model.load_state_dict", False),
    ),
    "never updated": (
        *(lambda model: model.conv1.norm.reset_running_stats(), "never updated", "conv1.norm"),
        *("error", RECALIBRATE, True),
    ),
    "momentum of keras": (
        *(set_momentum(0.99), "momentum convention", "conv1.norm", "error"),
        *("model.get_submodule('conv1.norm').momentum = 0.01", True),
    ),
    "momentum 1": (
        *(set_momentum(1.0), "momentum convention", "conv1.norm", "error"),
        *("model.get_submodule('conv1.norm').momentum = 0.1", True),
    ),
    "dead units": (
        *(kill, "dead units", "hidden0.activation", "error"),
        *("optimizer.param_groups[0]['lr']", False),
    ),
    "γ collapse": (collapse, "γ collapse", "hidden0.norm", "warning", "groups = [", False),
    "constant inputs": (
        *(constant_inputs, "near-zero variance", "hidden0.norm", "warning"),
        *("model.get_submodule('hidden0.norm').eps = 1e-3", False),
    ),
    "frozen yet updating": (
        *(lambda model: model.conv0.norm.requires_grad_(False), "frozen yet updating"),
        *("conv0.norm", "warning", "normlab.freeze(model.get_submodule('conv0.norm')", False),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_mended(lenet, batches, fault):
    plant, signal, layer, weight, fix, mended = FAULTS[fault]
    diagnosis = diagnose(planted(lenet, plant), batches)
    found = heavy(diagnosis)
    assert found.pop((signal, layer)) == weight
    # What follows from the fault may be found too, but nothing that it has no part in.
    assert {each for each, _ in found} <= {"train/eval gap", "stale statistics"}
    (finding,) = (
        each for each in diagnosis.findings if (each.signal, each.layer) == (signal, layer)
    )
    assert finding.fix.startswith(fix)
    if mended:
        fixed = diagnosis.fixed()
        assert heavy(fixed.after) == {}
        assert fixed.before is diagnosis
        assert fixed.done
    else:
        assert (signal, layer) in heavy(diagnosis.fixed().after)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_network_gives_no_more_than_information(lenet, other_lenet, seed):
    found = diagnose([lenet, other_lenet][seed], draw(seed), steps=60)
    assert heavy(found) == {}
    assert {each.signal for each in found.findings} - {"stale statistics"} == {"redundant bias"}


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("seed", range(10))
def test_ten_healthy_networks_give_no_more_than_information(seed, activation):
    network = train(seed, activation=activation, images=16000)
    assert heavy(diagnose(network, draw(seed), steps=160)) == {}


@pytest.mark.parametrize("arm", ["torch-batch", "sync"])
def test_torchs_layers_are_diagnosed_as_ours(lenet, batches, arm):
    model = planted(lenet, shift_mean)
    if arm == "sync":
        other = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        other = train(0, "torch-batch", images=100)
        other.load_state_dict(model.state_dict())
    assert not any(isinstance(each, normlab.BatchNorm2d) for each in other.modules())
    ours, theirs = (diagnose(each, batches) for each in (planted(lenet, shift_mean), other))
    assert heavy(ours) == heavy(theirs)
    for one, two in zip(ours.numbers, theirs.numbers, strict=True):
        assert (one.layer, one.worth) == (two.layer, pytest.approx(two.worth, rel=1e-3))


def test_the_gap_is_the_difference_of_the_two_accuracies(lenet, batches):
    model = planted(lenet, shift_mean)
    (gap,) = (f for f in diagnose(model, batches).findings if f.signal == "train/eval gap")
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    model.eval()
    evaluated = [model(x).argmax(1) for x, _ in batches]
    for norm in normlab.surgery.models.batch_norms(model).values():
        norm.training = True
    by_batch = [model(x).argmax(1) for x, _ in batches]
    right = [float((torch.cat(each) == labels).float().mean()) for each in (by_batch, evaluated)]
    assert gap.measured == pytest.approx(right[0] - right[1], abs=1e-6)
    assert gap.weight == "error"
    assert len(images) == 1024


def test_averaged_weights_without_their_statistics_are_stale(lenet, other_lenet, batches):
    """Weights between two networks have inputs of a variance that neither had."""
    average = copy.deepcopy(lenet)
    with torch.no_grad():
        for name, value in average.named_parameters():
            value.lerp_(other_lenet.get_parameter(name), 0.5)
    diagnosis = diagnose(average, batches)
    assert {signal for signal, _ in heavy(diagnosis)} >= {"stale statistics", "train/eval gap"}
    after = heavy(diagnosis.fixed().after)
    assert {"stale statistics", "train/eval gap"}.isdisjoint(signal for signal, _ in after)


def test_few_steps_with_a_small_momentum_leave_the_initial_value(batches):
    def slow(network):
        for norm in normlab.surgery.models.batch_norms(network).values():
            norm.momentum = 0.01
        return network

    from normlab.networks import build_network

    network = slow(build_network("lenet", "batch", 0, image_shape=(1, 28, 28), classes=10))
    for x, _ in batches * 4:
        network(x)
    diagnosis = diagnose(network, batches)
    left = [f for f in diagnosis.findings if f.signal == "momentum against steps"]
    assert left[0].measured == pytest.approx(0.99**32)
    assert "459 updates" in left[0].why
    assert heavy(diagnosis.fixed().after) == {}


def test_batches_by_class_are_told_and_everything_else_is_measured_on_mixed_ones(lenet, batches):
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    order = labels.argsort(stable=True)
    sorted_batches = list(zip(images[order].split(128), labels[order].split(128), strict=True))
    diagnosis = diagnose(lenet, sorted_batches)
    assert heavy(diagnosis) == {("order of the data", ""): "warning"}
    assert diagnosis.findings[0].measured < -0.02
    # The loader is not mended by recalibration, and so the finding stays.
    assert heavy(diagnosis.fixed().after) == heavy(diagnosis)
    used_up = diagnose(lenet, iter(sorted_batches))
    assert "gone through again" in used_up.not_measured["order of the data"]


def test_small_batches_are_noise(lenet, batches):
    images, labels = (torch.cat(each)[:512] for each in zip(*batches, strict=True))
    four = list(zip(images.split(4), labels.split(4), strict=True))
    diagnosis = diagnose(lenet, four)
    found = heavy(diagnosis)
    assert found == {
        (signal, f"hidden{i}.norm"): weight
        for signal, weight in (("batch noise", "error"), ("tiny count", "warning"))
        for i in (0, 1)
    }
    (fix,) = {f.fix for f in diagnosis.findings if f.signal == "batch noise"}
    scope = {"model": lenet, "batches": four[:2], "normlab": normlab}
    exec(fix, scope)
    kinds = {type(each) for name, each in scope["model"].named_modules() if name.endswith("norm")}
    assert kinds == {nn.GroupNorm}
    alone = heavy(diagnose(lenet, [*batches, (images[:1], labels[:1])]))
    assert alone == {("tiny count", "hidden0.norm"): "error"}


def test_another_domain_is_told_from_the_same(lenet, batches):
    inverted = [(1 - x, y) for x, y in batches]
    reference = draw(3, 2048)
    shifted = diagnose(lenet, inverted, reference=reference)
    names = {layer for signal, layer in heavy(shifted) if signal == "shift of domain"}
    assert names == {"conv0.norm", "conv1.norm", "hidden0.norm", "hidden1.norm"}
    assert not any(f.signal == "stale statistics" for f in shifted.findings)
    same = diagnose(lenet, batches, reference=reference)
    assert "shift of domain" not in {each.signal for each in same.findings}
    assert "shift of domain" not in same.not_measured
    assert (
        "8 batches"
        in diagnose(lenet, batches, reference=reference[:2]).not_measured["shift of domain"]
    )


def test_a_norm_without_running_statistics_makes_answers_depend_on_the_batch(lenet, batches):
    model = copy.deepcopy(lenet)
    norm = normlab.BatchNorm2d(16, track_running_stats=False)
    norm.load_state_dict(lenet.conv1.norm.state_dict(), strict=False)
    model.conv1.norm = norm
    found = heavy(diagnose(model, batches))
    assert found == {("evaluation depends on the batch", "conv1.norm"): "warning"}


class Shared(nn.Module):
    """One norm for two inputs of means that are `distance` deviations apart."""

    def __init__(self, distance):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.distance = distance

    def forward(self, x):
        return self.out(self.norm(x) + self.norm(x + self.distance).relu())


@pytest.mark.parametrize(("distance", "found"), [(0.0, False), (3.0, True)])
def test_a_layer_for_inputs_that_differ_is_found(distance, found):
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    model = Shared(distance)
    for part in x.split(64):
        model(part)
    diagnosis = diagnose(model, x.split(64))
    signals = [f for f in diagnosis.findings if f.signal == "shared layer"]
    assert [f.layer for f in signals] == ["norm"] * found
    if found:  # Means d apart in a variance of 1 + d²/4.
        assert signals[0].measured == pytest.approx(3 / (1 + 9 / 4) ** 0.5, rel=0.05)


def mlp(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for _ in range(80):
        model(torch.randn(64, 20))
    return model


def data(n=1024, size=64):
    g = torch.Generator().manual_seed(1)
    y = torch.randint(3, (n,), generator=g)
    return list(zip(torch.randn(n, 20, generator=g).split(size), y.split(size), strict=True))


def test_a_norm_on_logits_is_found():
    on_logits = mlp(nn.Linear(20, 3, bias=False), nn.BatchNorm1d(3), nn.LogSoftmax(1))
    below = mlp(nn.Linear(20, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    assert heavy(diagnose(on_logits, data())) == {("batch norm on logits", "1"): "warning"}
    assert heavy(diagnose(below, data())) == {}
    assert (
        "labels" in diagnose(on_logits, [x for x, _ in data()]).not_measured["batch norm on logits"]
    )


@pytest.mark.parametrize("dropout", [nn.Dropout, normlab.layers.Dropout])
def test_dropout_before_a_norm_is_found_and_after_it_is_not(dropout):
    def layers(p):
        return nn.Linear(20, 40), nn.ReLU(), dropout(p), nn.Linear(40, 30), nn.BatchNorm1d(30)

    before = mlp(*layers(0.5), nn.ReLU(), nn.Linear(30, 3))
    diagnosis = diagnose(before, data())
    (finding,) = (f for f in diagnosis.findings if f.signal == "dropout before batch norm")
    assert (finding.layer, finding.weight) == ("4", "warning")
    # Dropout adds p/(1−p)·E[h²]·|w|² to the variance of w·h: the ratio is below 1.
    assert finding.measured < -0.1
    assert not any(
        f.signal == "dropout before batch norm"
        for f in diagnose(
            mlp(*layers(0.0), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3)), data()
        ).findings
    )


def test_saturated_units_are_found_but_not_a_gate_at_the_end():
    model = mlp(nn.Linear(20, 10), nn.Sigmoid(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh())
    with torch.no_grad():
        model[0].bias[:3] = 9
        model[3].bias.fill_(9)
    for _ in range(80):
        model.train()(torch.randn(64, 20))
    found = heavy(diagnose(model, [x for x, _ in data()]))
    assert found == {("saturated units", "1"): "warning"}


def test_gradients_explode_in_a_deep_network_without_skips():
    torch.manual_seed(0)
    layers = []
    for _ in range(90):
        layers += [nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    deep = nn.Sequential(nn.Linear(20, 32), *layers, nn.Linear(32, 3))
    found = heavy(diagnose(deep, data(256)))
    assert found[("gradient explosion", "2")] == "error"
    shallow = nn.Sequential(nn.Linear(20, 32), *layers[:30], nn.Linear(32, 3))
    assert "gradient explosion" not in {signal for signal, _ in heavy(diagnose(shallow, data(256)))}


def test_several_updates_a_step_are_gradient_accumulation(lenet, batches):
    diagnosis = diagnose(lenet, batches, steps=15)  # 60 updates in training.
    found = [f for f in diagnosis.findings if f.signal == "gradient accumulation"]
    assert [f.measured for f in found] == [4.0] * 4
    assert found[0].weight == "information"
    assert found[0].fix.endswith(f"momentum = {1 - 0.9**0.25:.3g}")
    assert "gradient accumulation" not in {
        f.signal for f in diagnose(lenet, batches, steps=60).findings
    }


def test_decay_of_γ_is_told_by_the_optimizer(lenet, batches):
    norms = [p for name, p in lenet.named_parameters() if "norm" in name]
    others = [p for name, p in lenet.named_parameters() if "norm" not in name]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others}]

    def decays(given):
        found = diagnose(lenet, batches, optimizer=torch.optim.AdamW(given)).findings
        return {f.layer: f.measured for f in found if f.signal == "decay on γ and β"}

    assert decays(groups) == {}
    names = ("conv0", "conv1", "hidden0", "hidden1")
    assert decays(lenet.parameters()) == {f"{name}.norm": 0.01 for name in names}


def test_a_residual_branch_that_begins_closed_is_healthy():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(20, 20, bias=False), nn.BatchNorm1d(20)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x + self.norm(self.linear(x))

    def collapsed(model):
        return [f.layer for f in diagnose(model, data()).findings if f.signal == "γ collapse"]

    assert collapsed(mlp(Block(), nn.Linear(20, 3))) == []
    plain = mlp(nn.Linear(20, 20, bias=False), nn.BatchNorm1d(20), nn.Linear(20, 3))
    nn.init.zeros_(plain[1].weight)
    assert collapsed(plain) == ["1"]


def test_the_fixes_that_are_whole_lines_run_and_help(lenet, batches):
    """What a user would copy from the terminal."""

    def keep(model):
        set_momentum(0.95)(model)
        shift_mean(model)
        model.conv0.norm.requires_grad_(False)

    model = planted(lenet, keep)
    findings = [f for f in diagnose(model, batches).findings if f.weight != "information"]
    scope = {"model": model, "batches": batches, "normlab": normlab}
    for fix in dict.fromkeys(each.fix for each in findings):
        exec(fix, scope)
    assert heavy(diagnose(scope["model"], batches)) == {}


def test_a_layer_that_is_frozen_is_not_judged_by_its_statistics(lenet, batches):
    thawed = planted(lenet, shift_mean)
    model, _ = normlab.freeze(thawed)
    assert "stale statistics" in {signal for signal, _ in heavy(diagnose(thawed, batches))}
    assert "stale statistics" not in {signal for signal, _ in heavy(diagnose(model, batches))}
