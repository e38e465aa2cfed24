"""What keeps a signal silent, each condition by itself, and what it then says instead."""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from normlab.doctor import SIGNALS
from normlab.doctor.finding import MissingError
from normlab.doctor.observations import Answers, Observations
from normlab.doctor.statistics import drift
from normlab.probes import Flow, Units

from .conftest import buffers, moments, observed, weight_of

NAN = float("nan")


def found_in(seen):
    """By signal, what is found; of those that can be measured."""
    found = {}
    for signal in SIGNALS.values():
        with suppress(MissingError):
            found |= {each.signal: each.weight for each in signal(seen)}
    return found


def norm(momentum=0.1, tracked=1000, seen_by=None, **options):
    """What is observed of one layer, called with batches of mean 2 unless rows are given."""
    module = nn.BatchNorm1d(1, momentum=momentum, **options)
    seen = observed(*(seen_by or [moments([2.0], [1.0])] * 8), module=module)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(tracked)
    return seen


def of(seen):
    return seen.layers["norm"]


def test_a_layer_without_running_statistics_has_none_that_are_wrong():
    seen = norm(momentum=0.99, track_running_stats=False)
    of(seen).frozen_parameters = True
    seen.evaluated = {"norm": [moments([2.0], [1.0])] * 8}
    seen.reference = {"norm": [moments([0.0], [1.0])] * 8}
    assert found_in(seen) == {}


def test_a_layer_without_γ_and_β_has_none_that_are_wrong():
    seen = norm(seen_by=[moments([0.0], [1.0])] * 8, affine=False)
    of(seen).frozen_parameters = True
    assert found_in(seen) == {}
    of(seen).module.running_var.fill_(1e-6)
    (found,) = SIGNALS["near-zero variance"](seen)
    assert (found.weight, found.measured) == ("warning", pytest.approx(1 / math.sqrt(1.1e-5)))


def test_a_layer_that_is_held_normalizes_by_what_it_has():
    """With every fault that a layer in training would be told of."""
    rows = [moments([each], [1.0], 8.0) for each in (-9.0, 9.0) * 4]
    seen = norm(momentum=0.99, tracked=4, seen_by=rows)
    layer = of(seen)
    layer.calls = [rows, [moments([99.0], [1.0], 8.0)] * 8]
    layer.dropped = [moments([0.0], [9.0])] * 8
    layer.frozen_parameters = True
    seen.flow = Flow(biases={"norm": "linear"}, dropouts={"norm": ["drop"]})
    seen.steps, seen.world_size = 1, 2
    untold = {"stale statistics", "momentum convention", "tiny count", "batch noise"}
    untold |= {"unsynced ranks", "gradient accumulation", "shared layer", "redundant bias"}
    untold |= {"dropout before batch norm", "frozen yet updating"}
    assert set(found_in(seen)) == untold
    layer.module.momentum = 0.1
    assert "momentum against steps" in found_in(seen)
    layer.held = True
    assert found_in(seen) == {}
    layer.module.num_batches_tracked.zero_()
    assert found_in(seen) == {}


@pytest.mark.parametrize(
    "signal", ["never updated", "momentum against steps", "stale statistics", "train/eval gap"]
)
def test_an_untrained_model_is_not_asked_for_statistics(signal):
    seen = norm(tracked=0)
    right = np.ones(1000, bool)
    seen.answers = Answers(~right, right)
    assert weight_of(signal, seen) is MissingError


def test_a_layer_that_was_never_updated_is_told_by_that_alone():
    seen = norm(tracked=0)
    seen.steps = 3
    assert found_in(seen) == {"never updated": "error"}
    of(seen).module.eps = 0.2  # An initial variance says nothing of the data.
    assert found_in(seen) == {"never updated": "error"}
    for name, value in (("running_mean", 0.5), ("running_var", 2.0)):
        other = norm(tracked=0)
        getattr(of(other).module, name).fill_(value)
        assert "never updated" not in found_in(other)


def test_channels_that_are_not_finite_are_left_out_of_the_drift():
    """And those of negative variance, however small; those are told by themselves."""
    rows = [moments([0.0] * 5, [1.0] * 5)] * 8
    module = buffers(
        running_mean=[NAN, 0.0, 0.0, 0.0, 0.3], running_var=[1.0, NAN, math.inf, -1e-6, 1.0]
    )
    seen = observed(*rows, module=module)
    assert drift(of(seen))[0] == pytest.approx(0.3, rel=1e-4)
    assert drift(of(seen))[1] < 1e-3
    assert "near-zero variance" not in found_in(seen)
    module.running_mean.fill_(NAN)
    assert drift(of(seen)) is None


def test_a_single_value_has_no_variance_to_drift_from():
    assert drift(of(norm(seen_by=[moments([2.0], [0.0], 1.0)]))) is None


def test_chance_without_a_count_or_with_one_batch():
    """An average of nobody knows how many batches may be of one; one batch has its values."""
    seen = norm(momentum=None, tracked=0)
    of(seen).module.bias.data.fill_(1.0)
    of(seen).module.running_mean.fill_(0.5)
    assert weight_of("stale statistics", seen) == "error"

    def one_batch(mean):
        return weight_of("stale statistics", norm(seen_by=[moments([mean], [63 / 64], 64.0)]))

    chance = 4 * math.sqrt((0.1 / 1.9 + 1) / 64) * math.sqrt(63 / 64)
    assert (one_batch(0.99 * chance), one_batch(1.01 * chance)) == (None, "warning")


def test_steps_count_updates_where_the_layer_does_not():
    seen = norm(tracked=0)
    of(seen).module.running_mean.fill_(0.5)
    assert weight_of("momentum against steps", seen) is None  # Nothing says how many.
    seen.steps = 10
    (found,) = SIGNALS["momentum against steps"](seen)
    assert found.measured == pytest.approx(0.9**10)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.5])
def test_a_momentum_that_forgets_by_no_power_has_no_share_left(momentum):
    assert weight_of("momentum against steps", norm(momentum=momentum, tracked=2)) is None


def test_few_updates_that_gave_the_right_statistics_are_enough():
    fitting = [moments([0.0], [1.0])] * 8
    assert weight_of("momentum against steps", norm(tracked=8, seen_by=fitting)) is None


def test_no_momentum_is_no_convention():
    assert weight_of("momentum convention", norm(momentum=None)) is None


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_each_tensor_of_a_layer_is_looked_at(name):
    seen = observed(module=nn.BatchNorm1d(3))
    with torch.no_grad():
        getattr(of(seen).module, name)[1] = NAN
    (found,) = SIGNALS["not finite"](seen)
    assert (found.measured, name in found.quantity) == (1.0, True)
    learned = name in ("weight", "bias")
    assert found.fix.startswith("model.load_state_dict" if learned else "model, report = normlab")


def test_a_large_γ_over_inputs_that_vary_blows_nothing_up():
    assert weight_of("near-zero variance", observed(module=buffers(weight=[1000.0]))) is None


def shifted(ours, theirs, module=None):
    seen = observed(module=module)
    seen.evaluated = {"norm": [moments([each], [1.0]) for each in ours]}
    seen.reference = {"norm": [moments([each], [1.0]) for each in theirs]}
    return seen


def test_the_shift_is_that_of_the_batch_in_the_middle():
    """Of three batches one is far off and one is not at all."""
    seen = shifted([9.0, 1.0, 0.0], [0.0] * 8)
    (found,) = SIGNALS["shift of domain"](seen)
    assert found.measured == pytest.approx(1 / 2, rel=1e-4)


def test_a_layer_in_another_domain_is_not_called_stale():
    def found(theirs):
        seen = shifted([9.0] * 8, [theirs] * 8)
        of(seen).calls = [seen.evaluated["norm"]]
        return found_in(seen)

    assert found(9.0) == {"stale statistics": "error"}
    assert found(0.0) == {"shift of domain": "warning"}


def test_ε_counts_in_the_shift():
    module = nn.BatchNorm1d(1, eps=1.0)
    module.running_var.fill_(3.0)
    (found,) = SIGNALS["shift of domain"](shifted([2.0], [0.0] * 8, module))
    assert found.measured == pytest.approx((math.log(4 / 2) + (2 + 4) / 4 - 1) / 2)


def test_a_negative_variance_is_no_domains():
    module = nn.BatchNorm1d(1)
    module.running_var.fill_(-1.0)
    assert weight_of("shift of domain", shifted([9.0], [0.0] * 8, module)) is None


def test_layers_are_compared_where_both_domains_called_them():
    seen = shifted([9.0], [0.0] * 8)
    seen.layers |= {"spare": norm().layers["norm"], "new": norm().layers["norm"]}
    seen.layers["spare"].name, seen.layers["new"].name = "spare", "new"
    seen.evaluated["new"] = seen.evaluated["norm"]
    assert [each.layer for each in SIGNALS["shift of domain"](seen)] == ["norm"]
    seen.reference["spare"] = seen.reference["norm"][:7]
    assert weight_of("shift of domain", seen) is MissingError


def test_dropout_that_makes_the_variance_smaller_is_told_too():
    """A ratio by hand: of 2 + ε = 3 and the mean of 0 and 1, pooled, + ε = 1.5; one channel has no
    variance at all."""
    module = nn.BatchNorm1d(2, eps=0.0)
    rows = [moments([0.0, 0.0], [each, 0.0]) for each in (1.0, 3.0)]
    seen = observed(*rows, module=module)
    of(seen).dropped = [moments([0.0, 0.0], [each, 0.0]) for each in (0.5, 1.5)]
    seen.flow = Flow(dropouts={"norm": ["drop"]})
    signal = SIGNALS["dropout before batch norm"]
    (found,) = signal(seen)
    assert (found.measured, found.threshold) == (pytest.approx(math.log(2)), 0.1)
    assert found.weight == "warning"
    module.running_var[0] = 2.0
    assert next(signal(seen)).weight == "information"
    module.running_var[0] = 0.1
    assert next(signal(seen)).weight == "warning"
    of(seen).module = nn.BatchNorm1d(2, eps=1.0, track_running_stats=False)
    (found,) = signal(seen)
    # Of the channel without variance the ratio is ε/ε, and its logarithm 0.
    assert (found.weight, found.measured) == ("information", pytest.approx(math.log(3 / 2) / 2))


@pytest.mark.parametrize(("ratio", "weight"), [(0.099, "information"), (0.101, "warning")])
def test_the_running_variance_fits_within_the_threshold(ratio, weight):
    seen = observed(module=nn.BatchNorm1d(1, eps=0.0))
    of(seen).module.running_var.fill_(math.exp(ratio))
    of(seen).dropped = [moments([0.0], [9.0])]
    seen.flow = Flow(dropouts={"norm": ["drop"]})
    assert weight_of("dropout before batch norm", seen) == weight


def test_scores_are_of_classes():
    seen = observed(flow=Flow(last={"norm"}))
    for labels, width, weight in (
        (None, 3, MissingError),
        ([np.arange(3)], None, MissingError),
        ([np.arange(3)], 3, "warning"),
    ):
        seen.labels, seen.width = labels, width
        assert weight_of("batch norm on logits", seen) == weight


def test_calls_are_compared_with_each_other():
    """Three, of which that in the middle is apart; one channel never varies, and 39 are alike."""
    d = 3 / math.sqrt(2)  # The means 0, d and 0 have the variance 2d²/9 = 1.
    count = 41
    middle = [0.0, *[d] * 40]
    rows = [moments(mean, [0.0] + [1.0] * 40) for mean in ([0.0] * count, middle, [0.0] * count)]
    seen = observed(*rows, module=nn.BatchNorm1d(count, eps=0.0))
    of(seen).calls = [[each] for each in rows]
    (found,) = SIGNALS["shared layer"](seen)
    assert found.measured == pytest.approx(d / math.sqrt(2))
    of(seen).module.eps = 2.0
    (found,) = SIGNALS["shared layer"](seen)
    assert found.measured == pytest.approx(d / math.sqrt(4))
    assert "nn.BatchNorm1d(41) for _ in range(3)" in found.fix
    of(seen).module.__class__ = type("Mine", (nn.BatchNorm1d,), {})
    assert "ModuleList(Mine(41)" in next(SIGNALS["shared layer"](seen)).fix
    of(seen).calls = [[moments([0.0] * count, [0.0] * count)]] * 2
    of(seen).module.eps = 0.0
    assert weight_of("shared layer", seen) is None


def test_one_channel_of_many_that_is_apart_is_not_the_layers():
    rows = [moments([each] + [0.0] * 40, [1.0] * 41) for each in (0.0, 9.0)]
    seen = observed(*rows)
    of(seen).calls = [[each] for each in rows]
    assert weight_of("shared layer", seen) is None


def test_frozen_parameters_matter_where_the_layer_itself_is_in_training():
    seen = observed()
    of(seen).training = False
    assert weight_of("frozen yet updating", seen) is None  # None is frozen.
    (other,) = observed().layers.values()
    seen.layers["other"] = other
    of(seen).frozen_parameters = True
    assert weight_of("frozen yet updating", seen) is None


def test_decay_is_of_either_parameter_and_of_a_norm_that_is_the_model():
    seen = observed()
    assert weight_of("decay on γ and β", seen) is MissingError
    for decay, weight in (
        ({"norm.weight": 0.0, "norm.bias": 0.0, "other.weight": 0.1}, None),
        ({"norm.weight": 0.1}, "information"),
        ({"norm.bias": 0.1}, "information"),
    ):
        seen.decay = decay
        assert weight_of("decay on γ and β", seen) == weight
    of(seen).name, seen.decay = "", {"weight": 0.1}
    assert weight_of("decay on γ and β", seen) == "information"


def test_gradients_grow_from_the_first_layer_that_has_any():
    layers = {}
    for name, gradient in (("spare", None), ("a", 0.0), ("b", 1e8), ("c", 1.0), ("d", 0.0)):
        (layers[name],) = observed().layers.values()
        layers[name].name, layers[name].gradient = name, gradient
    (found,) = SIGNALS["gradient explosion"](Observations(layers))
    assert (found.layer, found.measured) == ("b", 1e8)
    assert "over 2 layers, 1e+08 a layer" in found.quantity
    del layers["c"]
    assert weight_of("gradient explosion", Observations(layers)) is None
    layers["b"].gradient = NAN
    assert weight_of("gradient explosion", Observations(layers)) is MissingError
    unknown = Observations(layers, gradient_unknown="labels")
    assert weight_of("gradient explosion", unknown) is MissingError


def units(kind, values=2000):
    on = torch.ones(10, dtype=torch.bool)
    return Units(kind, values, on, torch.full((10,), values if kind != "relu" else 0))


def test_dead_units_are_of_relu_and_saturated_ones_of_the_others():
    for kind, signal in (("relu", "dead units"), ("tanh", "saturated units")):
        seen = observed(units={"place": units(kind)})
        assert set(found_in(seen)) == {signal}
        (other,) = {"dead units", "saturated units"} - {signal}
        with pytest.raises(MissingError, match=r"^a (ReLU|sigmoid or tanh inside the model)$"):
            next(SIGNALS[other](seen))
    seen = observed(units={"few": units("relu", 999), "enough": units("relu", 1000)})
    assert [each.layer for each in SIGNALS["dead units"](seen)] == ["enough"]


def test_a_gate_may_be_saturated_and_what_saw_nothing_is_not():
    seen = observed(units={"place": units("tanh"), "unseen": Units("tanh")})
    assert weight_of("saturated units", seen) == "warning"
    seen.flow = Flow(gates={"place"})
    assert weight_of("saturated units", seen) is None
    del seen.units["unseen"]
    assert weight_of("saturated units", seen) is MissingError


def test_a_branch_may_be_closed():
    seen = observed(module=buffers(weight=[0.0]))
    assert weight_of("γ collapse", seen) == "warning"
    seen.flow = Flow(added={"norm"})
    assert weight_of("γ collapse", seen) is None


def noisy(**options):
    """Eight batches worth less than one value."""
    return observed(*[moments([each], [1.0]) for each in (-9.0, 9.0) * 4], **options)


def test_noise_is_of_two_batches_or_more_that_vary():
    two = observed(*[moments([each], [1.0]) for each in (-999.0, 999.0)])
    assert weight_of("batch noise", two) == "error"
    one = observed(moments([0.0], [1.0]))
    assert weight_of("batch noise", one) is MissingError
    one.batches = 2  # The layer was called in one of them.
    assert weight_of("batch noise", one) is None
    assert weight_of("batch noise", observed(*[moments([3.0], [0.0])] * 8)) is None


def test_groups_divide_the_channels_of_every_layer():
    def fix(*channels):
        seen = noisy()
        for count in channels:
            (layer,) = observed(module=nn.BatchNorm1d(count)).layers.values()
            seen.layers[f"{count}"] = layer
        of(seen).module = nn.BatchNorm1d(channels[0])
        return next(SIGNALS["batch noise"](seen)).fix

    assert "'group:32'" in fix(64)
    assert "'group:16'" in fix(64, 48)
    assert "'layer'" in fix(64, 3)


def test_the_rest_is_what_is_smaller_than_most():
    def fix(*sizes):
        seen = observed(*[moments([0.0], [1.0], each) for each in sizes])
        return next(SIGNALS["tiny count"](seen)).fix

    assert "drop_last=True" in fix(4.0, 64.0, 64.0)
    assert "normlab.convert" in fix(4.0, 4.0, 64.0)
    seen = observed(moments([0.0], [1.0], 1.0))
    of(seen).calls = []  # In training it raised.
    assert "normlab.convert" in next(SIGNALS["tiny count"](seen)).fix


def test_ranks_are_two_or_more_and_each_batch_too_small():
    assert weight_of("unsynced ranks", noisy(world_size=2)) == "warning"
    assert weight_of("unsynced ranks", observed(world_size=2)) is None


def accumulated(tracked, seen, momentum=0.1):
    seen.steps = 100
    of(seen).module.num_batches_tracked.fill_(tracked)
    of(seen).module.momentum = momentum
    return next(SIGNALS["gradient accumulation"](seen), None)


def test_updates_a_step_are_a_whole_number_above_one():
    measured = [accumulated(each, observed()) for each in (100, 200, 402, 403)]
    assert [each and each.measured for each in measured] == [None, 2.0, 4.02, None]
    seen = observed(steps=0)
    assert weight_of("gradient accumulation", seen) is None  # No step was taken.
    seen.steps = None
    assert weight_of("gradient accumulation", seen) is MissingError
    seen = observed()
    of(seen).calls = []  # Not called here.
    assert accumulated(400, seen).measured == 4.0


def test_what_several_updates_a_step_need():
    """Four updates with .026 leave .974⁴ = .9 of the old; groups where batches are noise."""
    found = accumulated(402, observed())
    assert (found.weight, found.fix[-16:]) == ("information", "momentum = 0.026")
    found = accumulated(400, noisy())
    assert found.weight == "warning"
    assert "normlab.convert" in found.fix
    found = accumulated(400, observed(), momentum=None)
    assert found.weight == "information"
    assert "normlab.convert" in found.fix


def test_the_noise_of_accumulated_batches_waits_for_evidence():
    """Two batches worth 17 values may well be worth thousands."""
    rows = [moments([each], [1.0]) for each in (-0.17, 0.17)]
    seen = observed(*rows)
    assert of(seen).worth < 32
    assert accumulated(400, seen).weight == "information"


def test_the_gap_needs_answers():
    assert weight_of("train/eval gap", observed()) is MissingError


def test_a_part_that_could_not_be_run_is_told():
    assert weight_of("evaluation depends on the batch", observed()) is MissingError


def test_answers_that_depend_on_the_batch_are_the_models_or_a_layers():
    signal = SIGNALS["evaluation depends on the batch"]
    (found,) = signal(observed(part=0.5))
    assert (found.layer, found.measured) == ("", 0.5)
    seen = norm(track_running_stats=False)
    seen.part = 0.5
    assert [each.layer for each in signal(seen)] == ["norm"]


def test_the_order_needs_labels_and_answers():
    signal = "order of the data"
    right = np.ones(1000, bool)
    options = {"labels": [np.arange(3)], "given": ~right, "answers": Answers(right, right)}
    assert weight_of(signal, observed(**options)) == "warning"
    assert weight_of(signal, observed(**options | {"labels": None})) is MissingError
    assert weight_of(signal, observed(**options | {"given": None})) is None
    assert weight_of(signal, observed(**options | {"answers": None})) is None
    assert weight_of(signal, observed(**options, order_unknown="samples")) is MissingError
