"""The passes that a model is run in: how each is run, what it leaves, and what is counted."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from normlab import diagnose
from normlab.doctor.observe import Observer
from normlab.errors import InputError

from .conftest import labelled, moments, observed


class Net(nn.Module):
    """Notes how each pass is run; raises at one of them."""

    def __init__(self, fails=0, error=ZeroDivisionError):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.dropout, self.last, self.out = nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(()))
        self.passes, self.fails, self.error = [], fails, error

    def forward(self, x):
        modes = (self.norm.training, self.dropout.training)
        self.passes.append((len(x), torch.is_grad_enabled(), *modes))
        self.count += 1
        y = self.out(self.last(self.dropout(self.norm(self.linear(x)))))
        if len(self.passes) == self.fails:
            raise self.error("of the user's")
        return y


def data(count=2, size=8):
    return labelled(count, size)


def state(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    return (
        [each.training for each in model.modules()],
        [each.tolist() for each in (*model.buffers(), *model.parameters())],
        [each.grad for each in model.parameters()],
        hooks,
        torch.get_rng_state().tolist(),
        random.getstate(),
        # The legacy generator is the global one, which users draw from.
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


EVALUATED, PART, BACKWARD = (
    (8, False, False, False),
    (4, False, False, False),
    (8, True, True, False),
)
BY_BATCH, DROPPED = (8, False, True, False), (8, False, True, True)


def test_the_passes():
    model = Net()
    Observer(model).observe(data())
    first = [EVALUATED, PART, BACKWARD, BY_BATCH, DROPPED]
    assert model.passes == [*first, EVALUATED, BY_BATCH, DROPPED]


@pytest.mark.parametrize("fails", range(9))
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_run_is_as_it_was_whichever_pass_raises(fails, error):
    model = Net(fails, error)
    model.last.eval()
    before = state(model)
    if not fails or (error is ZeroDivisionError and fails in (2, 3)):  # In part, and backward.
        seen = Observer(model).observe(data())
        assert ("ZeroDivisionError" in f"{seen.part}") is (fails == 2)
        assert ("ZeroDivisionError" in seen.gradient_unknown) is (fails == 3)
    else:
        batch = 1 if fails < 6 else 2
        expected = InputError if error is ZeroDivisionError else error
        with pytest.raises(expected, match=f"^(batch {batch}, .*: )?of the user's$"):
            Observer(model).observe(data())
    assert state(model) == before


def test_the_same_is_observed_again():
    model = Net()
    observer = Observer(model)
    one, two = observer.observe(data()), observer.observe(data())
    assert (one.batches, one.samples) == (two.batches, two.samples) == (2, 16)
    for name, layer in one.layers.items():
        assert (layer.batches, layer.least) == (two.layers[name].batches, layer.least) == (2, 8)
        assert layer.worth == two.layers[name].worth
        assert [len(each.dropped) for each in (layer, two.layers[name])] == [
            2 * (name == "last")
        ] * 2


def test_modes_are_set_and_train_is_not_called():
    class Merging(nn.Linear):
        def train(self, *_):
            raise AssertionError("merges weights")

    model = nn.Sequential(Merging(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    assert diagnose(model, data()).batches == 2


def test_answers_are_of_both_ways_to_normalize():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].momentum = 1.0  # A batch that is normalized by must not show in the next.
    model[0].running_mean.copy_(torch.linspace(-9, 9, 6))
    answers = Observer(model).observe(data()).answers
    right = {}
    for mode in (False, True):
        model.train(mode)
        right[mode] = torch.cat([model(x).argmax(1) == y for x, y in data()])
    assert answers.by_batch.tolist() == right[True].tolist()
    assert answers.evaluated.tolist() == right[False].tolist()
    assert right[True].tolist() != right[False].tolist()


class Centered(nn.Module):
    """Takes the batch's mean away, which evaluation should not."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(1, affine=False, eps=1e-12), scale

    def forward(self, x):
        y = self.norm(x) * self.scale
        return y - y.mean() * (y > 0)


def test_a_part_of_a_batch_by_hand():
    """0, 1, 2, 4 less their mean, but for 0, are 0, -.75, .25, 2.25; and 0, 1 are 0, .5."""
    x = torch.tensor([[0.0], [1.0], [2.0], [4.0]])

    def part(model, batch):
        return Observer(model).observe([batch]).part

    assert part(Centered(), x) == pytest.approx(1.25 / 2.25)
    (found,) = (f for f in diagnose(Centered(), [x]).findings if "evaluation" in f.signal)
    assert found.measured == pytest.approx(1.25 / 2.25)
    assert not [f for f in diagnose(Centered(0.0), [x]).findings if "evaluation" in f.signal]
    assert part(nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0)), x) == 0.0
    assert part(nn.Sequential(nn.BatchNorm1d(1), nn.Unflatten(0, (2, 2))), x).startswith("a batch")
    assert part(Total(), x).startswith("a batch")
    assert part(nn.BatchNorm1d(1), x[:1]).startswith("a batch of two samples")
    assert "one a sample" in part(Pairs(), x)
    assert "finite" in part(Centered(math.inf), x)


class Total(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.norm(x).sum()


class Pairs(nn.Module):
    """Answers for as many samples as there are, but no fewer than four."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.norm(x)[:, 0].repeat(2)[:4]


def told(model, batches, **options):
    return diagnose(model, batches, **options).not_measured


def classifier(classes=3):
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, classes))


def test_what_is_no_classification_has_no_accuracy():
    x = data(1)[0][0]
    fine = torch.arange(8) % 3
    assert "order of the data" not in told(classifier(), [(x, fine)] * 2)
    for model, labels in (
        (classifier(1), torch.zeros(8, dtype=torch.long)),
        (classifier(), fine.float()),
        (classifier(), fine - 1),
        (classifier(), fine + 1),
        (classifier(), fine > 1),
        (classifier(), fine[:4].repeat_interleave(2).view(4, 2)),
        (classifier().append(nn.Unflatten(1, (3, 1))), fine),
        (classifier(), torch.zeros((), dtype=torch.long)),
    ):
        missing = told(model, [(x, labels)] * 2)
        assert "labels of classes" in missing["train/eval gap"]
        assert "loss=" in missing["gradient explosion"]
    for labels in (fine.float(), fine > 1, fine.view(4, 2).repeat_interleave(2, 0)):
        assert "labels of classes" in told(classifier(), [(x, labels)] * 2)["order of the data"]
    # Of a batch in two the labels are missing.
    missing = told(classifier(), [(x, fine), (x, "none")])
    assert "labels" in missing["order of the data"]
    assert "train/eval gap" not in told(classifier(), [(x, fine), (x, "none")], steps=9)


def test_gradients_are_of_the_input_of_a_layers_first_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 5)
            self.norm, self.out = nn.BatchNorm1d(5), nn.Linear(5, 3)
            self.steps = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)

        def forward(self, x):
            self.given = self.linear(self.first(input=x))
            return self.out(self.norm(input=3 * self.norm(input=self.given)))

    torch.manual_seed(0)
    model, batches = Twice(), data()
    with torch.no_grad():
        seen = Observer(copy.deepcopy(model).requires_grad_(False)).observe(batches)
    x, y = batches[0]
    output = model.train()(x)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(output, y), model.given)
    assert seen.layers["norm"].gradient == pytest.approx(float(gradient.square().sum()), rel=1e-4)
    assert seen.layers["first"].gradient is None  # No gradient is asked for of the data.
    assert seen.gradient_unknown == ""


def test_the_fewest_values_are_of_any_call_and_any_batch():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            x = self.dropout(x)
            return self.out(torch.cat([self.norm(x), self.norm(x[:5] + 1)])[: len(x)])

    seen = Observer(Twice()).observe([*data(), *data(1, 9)])
    layer = seen.layers["norm"]
    assert (layer.least, layer.batches, seen.samples) == (5, 3, 25)
    assert [[each.n for each in row] for row in layer.calls] == [[8, 8, 9], [5, 5, 5]]
    assert layer.precise.n == 40
    assert [each.n for each in layer.dropped] == [8, 8, 9]
    found = Observer(Twice()).evaluate(data())
    assert [each.mean.tolist() for each in found["norm"]] == [
        pytest.approx(x.double().mean(0).tolist(), rel=1e-5) for x, _ in data()
    ]


def test_a_second_call_that_gets_what_is_not_finite():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.norm(x) / (x > -99))

    batches = data(3)
    batches[1][0][0, 0] = -100.0
    seen = Observer(Halved()).observe(batches)
    assert seen.broken == {"norm": 1}
    assert seen.layers["norm"].batches == 2


def test_a_variance_that_is_not_finite_is_not_either():
    batches = data(3)
    batches[1][0][0, 0] = 1e25
    assert Observer(nn.BatchNorm1d(6)).observe(batches).broken == {"": 1}


def test_a_single_value_is_told_and_any_other_failure_is_raised():
    batches = [*data(), *data(1, 1)]
    found = diagnose(classifier(), batches)
    assert [(each.signal, each.measured) for each in found.findings][:1] == [("tiny count", 1.0)]
    assert (found.batches, found.samples) == (3, 17)

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.norm(x)
            if self.norm.training or y.abs().max() > 1e9:
                raise ZeroDivisionError
            return y

    with pytest.raises(InputError, match=r"^batch 1, .*ZeroDivisionError"):
        diagnose(Fails(), data(size=2))
    # A layer that is held does not mind a single value, and so is not why it raised.
    model = nn.Sequential(normlab.freeze(nn.BatchNorm1d(6))[0], Second(Fails()))
    with pytest.raises(InputError, match=r"^batch 1, .*ZeroDivisionError"):
        diagnose(model, data(size=1))


class Second(nn.Module):
    """Gives what it has two samples for each that it gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.cat([x, x + 1]))[: len(x)]


def test_a_layer_is_held_where_training_would_not_normalize_by_the_batch():
    def frozen(change):
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
        model = change(model) or model
        return [each.frozen for each in diagnose(model, data()).numbers]

    assert frozen(nn.Module.train) == [False, False]
    assert frozen(lambda model: model.eval()) == [False, False]
    assert frozen(lambda model: model[2].eval() and None) == [False, True]
    assert frozen(lambda model: normlab.freeze(model)[0]) == [True, True]
    assert frozen(lambda model: normlab.freeze(model)[0].eval()) == [True, True]


def test_a_layer_whose_parameters_are_frozen_in_part_is_trained():
    model = classifier()
    model[0].weight.requires_grad_(False)
    signals = {each.signal for each in diagnose(model, data()).findings}
    assert "frozen yet updating" not in signals
    model[0].bias.requires_grad_(False)
    (found,) = (f for f in diagnose(model, data()).findings if f.signal == "frozen yet updating")
    assert found.measured == 2.0
    assert "model.train()" in told(model.eval(), data())["frozen yet updating"]


def test_devices_are_looked_at_where_nobody_says_what_to_move():
    away = [x.to("meta") for x, _ in data()]
    model = nn.Sequential(nn.BatchNorm1d(6))
    made = diagnose(model, away, forward=lambda model, batch: model(torch.randn(batch.shape)))
    assert made.samples == 16
    with pytest.raises(InputError) as caught:
        diagnose(model, away, device="cpu")
    assert "pass device=" not in str(caught.value)
    bare = nn.Sequential(nn.BatchNorm1d(6, affine=False, track_running_stats=False))
    assert diagnose(bare, [x for x, _ in data()]).samples == 16

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x, index):
            assert index.is_meta
            return self.norm(x)

    indexed = [
        {"x": x, "index": torch.zeros(8, dtype=torch.long, device="meta")} for x, _ in data()
    ]
    assert diagnose(Indexed(), indexed).samples == 16


def test_a_batch_that_no_one_knows_is_told_as_it_is():
    with pytest.raises(InputError, match=r"^a batch is a str: "):
        diagnose(classifier(), ["x"])


def layer_of(rows, module=None):
    return observed(*[moments(*each) for each in rows], module=module).layers["norm"]


def test_what_a_batch_is_worth_where_something_cannot_be_measured():
    """A channel without variance is left out; of batches of unlike sizes the middle one is most."""
    one = layer_of([([0.0, 3.0], [9.0, 0.0]), ([2.0, 3.0], [9.0, 0.0])])
    assert one.worth == pytest.approx(1 / (2 / 10))
    assert math.isnan(layer_of([([3.0], [0.0])] * 2).worth)
    assert math.isnan(layer_of([([math.nan], [1.0])] * 2).worth)
    middle = layer_of([([0.0], [9.0], n) for n in (64.0, 64.0, 128.0)])
    assert middle.worth == 64
    little = layer_of([([each], [9.0], 8.0) for each in (0.0, 0.1)])
    assert little.worth == 8


@pytest.mark.parametrize(
    ("name", "value", "trained"),
    [
        *(("running_mean", 1.0, True), ("running_var", 2.0, True), ("bias", 1.0, True)),
        *(("num_batches_tracked", 1, True), ("weight", 0.5, False)),
    ],
)
def test_what_tells_that_a_model_was_trained(name, value, trained):
    """γ is set by some to another value from the start, for all channels alike."""

    def is_trained(model, **options):
        return "stale statistics" not in told(model, data(), **options)

    model = classifier()
    assert not is_trained(model)
    with torch.no_grad():
        getattr(model[0], name).fill_(value)
    assert is_trained(model) is trained
    bare = nn.Sequential(nn.BatchNorm1d(6, affine=False, track_running_stats=False))
    assert not is_trained(bare)
    assert is_trained(bare, steps=1)
    with torch.no_grad():
        model = classifier()
        model[0].weight[0] = 0.5
    assert is_trained(model)
