import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab
from normlab.data import load, scale, split
from normlab.errors import InputError
from normlab.networks import build_network
from normlab.training import Fleet, Recipe, Replica, Trainer, program
from normlab.training.fleet import Engine
from normlab.training.steps import Steps


@pytest.fixture(scope="module")
def mnist():
    return load("mnist")


def network(arm="batch", seed=0):
    return build_network("mlp:16,8", arm, seed, image_shape=(1, 28, 28), classes=10)


def batches(mnist, count, size=32):
    return [
        (mnist.images[i * size : (i + 1) * size], mnist.labels[i * size : (i + 1) * size])
        for i in range(count)
    ]


@pytest.mark.parametrize("fields", [{}, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("kind", ["bytes", "numbers"])
def test_steps_are_those_of_torch_optim(mnist, fields, kind):
    ours = network().double()
    theirs = copy.deepcopy(ours)
    trainer = Trainer(ours, weight_decay=0.01, **fields)
    options = {"lr": 0.01, **fields}
    cls = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[options.pop("optimizer", "adam")]
    reference = cls(theirs.parameters(), weight_decay=0.01, foreach=False, **options)
    for x, y in batches(mnist, 4):
        scaled = scale(x, "0..1").double()
        loss = F.cross_entropy(theirs(scaled), y)
        reference.zero_grad()
        loss.backward()
        reference.step()
        assert trainer.step(x if kind == "bytes" else scaled, y) == pytest.approx(
            loss.item(), 1e-12
        )
    for (name, mine), its in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12, msg=name)
    (prepared,) = trainer._prepared.values()
    assert isinstance(prepared.run, Steps)  # No other than a fleet would take.


def test_steps_are_a_fleets_bit_for_bit(mnist):
    recipe = Recipe(network="mlp:16,8", batch_size=32)
    splits = split(mnist, 5000)
    replica = Replica("batch+dropout:0.5", 0.01, 3)
    fleet = Fleet([network(replica.arm, 3)], [replica], recipe, splits, Engine("looped", "native"))
    mine = network(replica.arm, 3)
    trainer = Trainer(mine, lr=0.01, seed=3)
    fleet.advance(5)
    for batch in fleet._shuffled[0, : 5 * 32].split(32):
        trainer.step(mnist.images[batch], mnist.labels[batch])
    for name, value in fleet.state(0).items():
        assert mine.state_dict()[name].equal(value), name


def test_evaluation_is_in_eval_mode_whatever_the_batches(mnist):
    mine = network("batch+dropout:0.5")
    trainer = Trainer(mine)
    for x, y in batches(mnist, 3):
        trainer.step(x, y)
    mine.hidden0.eval()  # Frozen by the user, say.
    modes = [each.training for each in mine.modules()]
    x, y = mnist.images[60_000:60_500], mnist.labels[60_000:60_500]
    before = copy.deepcopy(mine.state_dict())
    whole, parts = trainer.evaluate(x, y), trainer.evaluate(x, y, batch_size=7)
    scaled = trainer.evaluate(scale(x, "0..1"), y)
    logits = copy.deepcopy(mine).eval()(scale(x, "0..1"))
    expected = F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()
    for found in (whole, parts, scaled):
        assert found == pytest.approx(expected, rel=1e-5)
    assert [each.training for each in mine.modules()] == modes
    assert all(mine.state_dict()[name].equal(value) for name, value in before.items())


def test_a_ragged_batch_gets_a_pass_of_its_own(mnist):
    mine = network("plain")
    theirs = copy.deepcopy(mine)
    trainer, reference = (
        Trainer(mine, optimizer="sgd", lr=0.1),
        torch.optim.SGD(theirs.parameters(), 0.1),
    )
    for size in (32, 5, 32, 1):
        x, y = mnist.images[:size], mnist.labels[:size]
        loss = F.cross_entropy(theirs(scale(x, "0..1")), y)
        reference.zero_grad()
        loss.backward()
        reference.step()
        assert trainer.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
    assert len(trainer._prepared) == 3


class Scaled(nn.Module):
    """Divides by a number of the batch's own, which a trace would hold fast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        return self.linear(x.flatten(1)) / float(x.mean())


def test_what_cannot_be_recorded_is_called(mnist):
    mine = Scaled()
    theirs = copy.deepcopy(mine)
    trainer = Trainer(mine, optimizer="sgd", lr=0.1)
    for x, y in batches(mnist, 3):
        x = scale(x, "0..1") * 2
        loss = F.cross_entropy(theirs(x), y)
        theirs.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= 0.1 * parameter.grad
        assert trainer.step(x, y) == pytest.approx(loss.item(), rel=1e-5)


def test_a_recorded_pass_that_does_something_else_is_not_taken(mnist, monkeypatch):
    made = []

    def wrong(network, width, scaling, tensors, code):
        made.append(code)
        run = make(network, width, scaling, tensors, code)
        return run if code == "eager" else lambda tensors: [2 * each for each in run(tensors)]

    make = program.make
    monkeypatch.setattr(program, "make", wrong)
    mine = network("plain")
    x, y = mnist.images[:8], mnist.labels[:8]
    expected = F.cross_entropy(mine(scale(x, "0..1")), y).item()
    assert Trainer(mine).step(x, y) == pytest.approx(expected, rel=1e-6)
    assert made == ["eager", "native", "traced", "eager"]


def test_dropout_of_torch_draws_from_the_seed_and_not_from_the_global_generator(mnist):
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        mine = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Dropout(0.5), nn.Linear(30, 10))
        before = torch.get_rng_state()
        trainer = Trainer(mine, seed=seed)
        losses.append([trainer.step(x, y) for x, y in batches(mnist, 2)])
        assert torch.get_rng_state().equal(before)
    assert losses[0] == losses[1] != losses[2]


def test_bad_input_is_one_line(mnist):
    x, y = mnist.images[:4], mnist.labels[:4]
    trainer = Trainer(network())
    for call, message in [
        (lambda: normlab.Trainer("mlp"), "expected a torch.nn.Module, got str"),
        (lambda: Trainer(nn.Flatten()), "the network has no parameter that"),
        (
            lambda: Trainer(network(), lr=0),
            "lr=0, weight_decay=0.0: expected finite numbers, a rate above 0",
        ),
        (lambda: Trainer(network(), optimizer="adan"), "unknown optimizer 'adan'"),
        (lambda: Trainer(network(), momentum=0.9), "momentum=0.9 belongs to sgd"),
        (lambda: trainer.step(x, y[:3]), r"x of shape \(4, 1, 28, 28\) and y of shape \(3,\)"),
        (lambda: trainer.step(x, y.float()), "torch.float32: expected"),
        (lambda: trainer.step(x[:0], y[:0]), "with N above 0"),
        (lambda: trainer.step(x, y + 10), "labels reach from 10 to 15: expected 0 to 9"),
        (lambda: trainer.step(x, y - 100), "labels reach from -100 to -95"),
        (lambda: trainer.evaluate(x, y, batch_size=0), "batch_size=0: expected at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    trainer.step(x, y)  # Known by now, and still checked.
    with pytest.raises(InputError, match="labels reach from"):
        trainer.step(x, y + 10)


def test_what_requires_no_gradient_stays_as_it_is(mnist):
    mine = network()
    mine.hidden0.requires_grad_(False)
    before = {name: each.clone() for name, each in mine.named_parameters()}
    trainer = Trainer(mine, weight_decay=0.1)
    for x, y in batches(mnist, 2):
        trainer.step(x, y)
    for name, each in mine.named_parameters():
        assert each.equal(before[name]) == name.startswith("hidden0"), name


class Expanded(nn.Module):
    """The gradient of its scale is one number, seen many times."""

    def __init__(self, last):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 5)
        self.scale = nn.Parameter(torch.full((7,), 0.1))
        self.last = last

    def forward(self, x):
        if self.last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.conv(x).mean((2, 3)) * self.scale.sum()


@pytest.mark.parametrize("last", [False, True])
def test_gradients_that_lie_otherwise_than_their_parameters_move_them_rightly(mnist, last):
    torch.manual_seed(0)
    mine = Expanded(last)
    theirs = copy.deepcopy(mine)
    trainer, reference = Trainer(mine), torch.optim.Adam(theirs.parameters(), 0.01)
    for x, y in batches(mnist, 3):
        loss = F.cross_entropy(theirs(scale(x, "0..1")), y)
        reference.zero_grad()
        loss.backward()
        reference.step()
        assert trainer.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
    for ours, its in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-5)


def test_a_network_that_got_other_memory_is_refused(mnist):
    mine = network()
    trainer = Trainer(mine)
    (x, y), *_ = batches(mnist, 1)
    trainer.step(x, y)
    mine.load_state_dict(copy.deepcopy(mine.state_dict()), assign=True)
    with pytest.raises(InputError, match="other parameters or buffers than when the Trainer was"):
        trainer.step(x, y)


class Twice(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.linear, self.drop, self.times = nn.Linear(784, 10), nn.Dropout(0.5), times

    def forward(self, x):
        x = self.linear(x.flatten(1))
        for _ in range(self.times):
            x = self.drop(x)
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_a_dropout_layer_has_one_place(mnist, times):
    (x, y), *_ = batches(mnist, 1)
    with pytest.raises(InputError, match=f"layer 'drop' is called {times} times in a pass"):
        Trainer(Twice(times)).step(x, y)


def test_what_a_network_cannot_take_or_returns_is_one_line(mnist):
    (x, y), *_ = batches(mnist, 1)
    trainer = Trainer(network())
    for call, message in [
        (lambda: trainer.step(x[:, :, :5], y), r"x of shape \(32, 1, 5, 28\) the network raised"),
        (lambda: trainer.step(x[:1], y[:1]), "the network raised ValueError: Expected more than 1"),
        (lambda: trainer.step(x.numpy(), y), "expected two tensors with samples, got ndarray"),
        (lambda: trainer.evaluate(x[:, :, :5], y), "the network raised RuntimeError"),
        (lambda: trainer.evaluate(x, y + 10), "labels reach from 10"),
        (lambda: Trainer(network(), lr=float("inf")), "expected finite numbers"),
        (lambda: Trainer(network(), optimizer="sgd", momentum=1.5), "momentum=1.5: Input should"),
        (lambda: Trainer(nn.Flatten(2)), "no parameter that requires a gradient"),
        (
            lambda: Trainer(nn.Sequential(nn.Linear(28, 10))).step(x, y),
            r"made an output of shape \(32, 1, 28, 10\): expected \(32, classes\)",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
