import itertools
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.data import Dataset, Splits, load, scale
from normlab.errors import NormlabError
from normlab.layers import draw_dropout_from
from normlab.networks import build_network
from normlab.probes import inside
from normlab.streams import stream
from normlab.training import (
    Engine,
    Fleet,
    Measurement,
    Outcome,
    Recipe,
    Replica,
    evaluation,
    trainer,
)

EAGER, TRACED = Engine("looped", "eager"), Engine("looped", "traced")
STACKED, NATIVE = Engine("stacked", "traced"), Engine("looped", "native")
ARMS = ["plain", "batch", "batch+dropout:0.5", "layer"]
SGD = {"optimizer": "sgd", "momentum": 0.9}
ADAM = {"optimizer": "adam"}
DECAY = 0.02
LR = {"sgd": 0.05, "adam": 0.01}


@pytest.fixture(scope="module")
def splits():
    """210 images to train on, 30 and 40 to evaluate on, mixed up in a data set of 300."""
    images, labels = load("mnist").images[-300:].clone(), load("mnist").labels[-300:].clone()
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    indices = {"train": mixed[:210], "validation": mixed[210:240], "test": mixed[240:280]}
    return Splits(Dataset("few", images, labels, train_size=260, classes=10), indices)


def train(*arguments, engine=EAGER):
    """By the module itself unless told otherwise, so that its hooks see every step."""
    return trainer.train(*arguments, engine)


def evaluate(network, *arguments):
    (found,) = evaluation.evaluate([network.eval()], *arguments)
    return found


def build(arm, seed=0):
    return build_network("mlp:16,8", arm, seed, image_shape=(1, 28, 28), classes=10)


def run(splits, recipe, arm="batch+dropout:0.5", lr=0.01, seed=0, decay=0.0, engine=TRACED):
    network = build(arm, seed)
    replica = Replica(arm, lr, seed, decay)
    return network, list(train(network, replica, recipe, splits, engine=engine))


def bits(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def measurements(events):
    *seen, last = events
    assert all(isinstance(event, Measurement) for event in seen)
    assert isinstance(last, Outcome)
    return seen


class Watch:
    """Keeps the inputs and modes of every forward pass of a network."""

    def __init__(self, network):
        self.trained_on, self.evaluated_on = [], []
        network.register_forward_pre_hook(self.see)

    def see(self, network, inputs):
        modes = {module.training for module in network.modules()}
        assert modes == {torch.is_grad_enabled()}
        (self.trained_on if network.training else self.evaluated_on).append(inputs[0].clone())


class Masked(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.empty(x.shape).bernoulli_(0.5, generator=self.generator)
        return torch.where(keep > 0, 2 * x, 0)


def stock_network(arm, seed):
    """The network of `build`, of stock modules alone, with the same first values."""
    masks, widths = stream(seed, "dropout"), [784, 16, 8]
    parts = OrderedDict(flatten=nn.Flatten())
    for i in range(2):
        block = OrderedDict(linear=nn.Linear(widths[i], widths[i + 1]))
        if arm.startswith("batch"):
            block["norm"] = nn.BatchNorm1d(widths[i + 1])
        if arm == "layer":
            block["norm"] = nn.LayerNorm(widths[i + 1])
        block["activation"] = nn.ReLU()
        if arm.endswith("dropout:0.5"):
            block["dropout"] = Masked(masks)
        parts[f"hidden{i}"] = nn.Sequential(block)
    parts["output"] = nn.Linear(8, 10)
    network = nn.Sequential(parts)
    network.load_state_dict(build(arm, seed).state_dict())
    return network


def by_hand(replica, recipe, splits):
    """What `train` should do, as the textbook has it; returns the network and its measurements."""
    torch.manual_seed(0)
    images, labels = splits.dataset.images / 255.0, splits.dataset.labels
    if recipe.scaling == "-1..1":
        images = 2 * images - 1
    network = stock_network(replica.arm, replica.seed)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            network.parameters(),
            replica.lr,
            momentum=recipe.momentum,
            weight_decay=replica.weight_decay,
            foreach=False,
        )
    else:
        optimizer = torch.optim.Adam(
            network.parameters(), replica.lr, weight_decay=replica.weight_decay, foreach=False
        )
    order, step, seen = stream(replica.seed, "order"), 0, []
    trained_on = []  # Loss, hits and size of the epoch's batches, as they were trained on.

    def look(epoch):
        network.eval()
        losses, hits, sizes = (sum(each) for each in zip(*trained_on, strict=True))
        values = {("batches", "loss"): losses / sizes, ("batches", "accuracy"): hits / sizes}
        for name, indices in splits.indices.items():
            with torch.no_grad():
                logits = network(images[indices]).double()
            loss = F.cross_entropy(logits, labels[indices])
            values[name, "loss"] = loss.item()
            right = (logits.argmax(dim=1) == labels[indices]).double()
            values[name, "accuracy"] = right.mean().item()
        network.train()
        seen.append((step, epoch, values))

    for epoch in range(recipe.epochs):
        places = torch.randperm(len(splits.indices["train"]), generator=order).tolist()
        shuffled = [int(splits.indices["train"][place]) for place in places]
        trained_on.clear()
        for steps in itertools.count(1):
            batch, shuffled = shuffled[: recipe.batch_size], shuffled[recipe.batch_size :]
            optimizer.zero_grad()
            logits = network(images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()
            hits = (logits.argmax(1) == labels[batch]).sum().item()
            trained_on.append((loss.item() * len(batch), hits, len(batch)))
            step += 1
            ends = not shuffled or (recipe.drop_last and len(shuffled) < recipe.batch_size)
            if ends or (recipe.evaluate_every and steps % recipe.evaluate_every == 0):
                look(epoch + ends)
            if ends:
                break
    return network, seen


# With -1..1 the gradient of a pixel that never changes is rounding error before a batch norm, which
# Adam would make as large as any other: hence sgd.
@pytest.mark.parametrize(
    "fields",
    [
        {**SGD, "drop_last": True, "scaling": "-1..1"},
        {**SGD, "drop_last": False, "batch_size": 20, "evaluate_every": 4},
        {**ADAM, "drop_last": True, "evaluate_every": 4},
        {**ADAM, "drop_last": False, "batch_size": 20},
    ],
    ids=["sgd-whole", "sgd-all", "adam-whole", "adam-all"],
)
@pytest.mark.parametrize("engine", [TRACED, NATIVE], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_training_is_the_textbooks_loop(splits, arm, engine, fields):
    recipe = Recipe(epochs=3, **fields)
    replica = Replica(arm, LR[recipe.optimizer], 7, DECAY)
    network, events = run(splits, recipe, *replica, engine=engine)
    reference, expected = by_hand(replica, recipe, splits)
    seen = measurements(events)
    assert [(m.step, m.epoch) for m in seen] == [(step, epoch) for step, epoch, _ in expected]
    # Up to 33 steps in float32, whose sums differ in their order alone.
    for measurement, (_, _, values) in zip(seen, expected, strict=True):
        assert measurement.replica == replica
        assert measurement.values == pytest.approx(values, abs=1e-5)
    torch.testing.assert_close(bits(network), bits(reference), rtol=1e-4, atol=1e-4)
    assert events[-1][:3] == (replica, "done", expected[-1][0])


EVERY_ARM = ["plain", "batch", "torch-batch", "layer", "group:2", "rms", "dropout:0.5"]
EVERY_ARM += ["batch@post", "batch@input", "batch+dropout:0.2"]


def in_double(splits, arm, recipe, engine, rates, steps):
    """Fifty steps of a fleet, one seed for each rate: its states, and the losses summed up."""
    networks = [build(arm, seed).double() for seed in range(len(rates))]
    replicas = [Replica(arm, lr, seed, DECAY * seed) for seed, lr in enumerate(rates)]
    trained = Fleet(networks, replicas, recipe, splits, engine)
    for stop in range(6, steps + 1, 6):
        trained.advance(stop)
    return [trained.state(r) for r in range(len(rates))], trained.losses


def by_hand_in_double(splits, replica, recipe, steps):
    if replica.arm in ("plain", "batch", "layer"):
        network = stock_network(replica.arm, replica.seed)
    else:
        network = build(replica.arm, replica.seed)
        draw_dropout_from(stream(replica.seed, "dropout"), network)
    network.double().train()
    kind = torch.optim.SGD if recipe.optimizer == "sgd" else torch.optim.Adam
    more = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    optimizer = kind(
        network.parameters(), replica.lr, weight_decay=replica.weight_decay, foreach=False, **more
    )
    order, total = stream(replica.seed, "order"), 0.0
    for step in range(steps):
        if step % 6 == 0:
            train = splits.indices["train"]
            shuffled = train[torch.randperm(len(train), generator=order)]
        batch = shuffled[step % 6 * 32 : step % 6 * 32 + 32]
        x = (splits.dataset.images[batch].float() * (1 / 255)).double()
        loss = F.cross_entropy(network(x), splits.dataset.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return network.state_dict(), total


@pytest.mark.parametrize(
    ("arm", "fields"),
    [(arm, ADAM) for arm in EVERY_ARM]
    + [(arm, SGD) for arm in ("plain", "batch", "batch+dropout:0.2")]
    + [
        pytest.param(arm, SGD, marks=pytest.mark.slow)
        for arm in EVERY_ARM
        if arm not in ("plain", "batch", "batch+dropout:0.2")
    ],
)
def test_stacked_looped_and_a_loop_by_hand_agree_to_1e_9_in_float64(splits, arm, fields):
    recipe, rates = Recipe(epochs=9, **fields), [0.01, 0.02, 0.005]
    expected = [
        by_hand_in_double(splits, Replica(arm, lr, seed, DECAY * seed), recipe, 48)
        for seed, lr in enumerate(rates)
    ]
    for engine in (TRACED, STACKED, NATIVE)[: 2 if arm == "rms" else 3]:
        states, losses = in_double(splits, arm, recipe, engine, rates, 48)
        for state, loss, (reference, total) in zip(states, losses, expected, strict=True):
            assert loss.item() == pytest.approx(total, rel=1e-10)
            assert state.keys() == reference.keys()
            for name, value in state.items():
                torch.testing.assert_close(value, reference[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", [TRACED, STACKED, NATIVE], ids=str)
def test_steps_into_another_epoch_are_those_that_stop_at_its_start(splits, engine):
    recipe, replicas = Recipe(epochs=3), [Replica("batch", 0.01, seed) for seed in range(2)]

    def advanced(*stops):
        trained = Fleet([build("batch", 0), build("batch", 1)], replicas, recipe, splits, engine)
        for stop in stops:
            trained.advance(stop)
        return trained

    whole, parts = advanced(14), advanced(2, 6, 12, 14)
    assert whole.step == parts.step == 14
    assert all(same_bits(whole.state(r), parts.state(r)) for r in range(2))


@pytest.mark.parametrize("engine", [TRACED, STACKED, NATIVE], ids=str)
def test_no_replica_touches_another(splits, engine):
    recipe, arm = Recipe(epochs=1, **SGD), "batch+dropout:0.5"
    one, _ = in_double(splits, arm, recipe, engine, [0.01, 0.01, 0.01], 12)
    for rates in ([0.01, 0.3, 0.01], [0.01, 1e6, 0.01]):
        other, _ = in_double(splits, arm, recipe, engine, rates, 12)
        for r in (0, 2):
            assert same_bits(one[r], other[r])
        assert not same_bits(one[1], other[1])


@pytest.mark.parametrize("engine", [TRACED, STACKED, NATIVE], ids=str)
def test_a_replica_of_a_fleet_that_diverges_leaves_the_others_as_they_are(splits, engine):
    recipe = Recipe(epochs=3, optimizer="sgd")

    def told(rates):
        replicas = [Replica("batch", lr, seed, 1.0) for seed, lr in enumerate(rates)]
        networks = [build("batch", seed) for seed in range(len(rates))]
        events = list(Fleet(networks, replicas, recipe, splits, engine).train())
        return [event[:3] if isinstance(event, Outcome) else event for event in events]

    well, ill = told([0.1, 0.1, 0.1]), told([0.1, 1e30, 0.1])
    assert [e for e in ill if e[0].seed != 1] == [e for e in well if e[0].seed != 1]
    assert [e[1:] for e in ill if e[0].seed == 1] == [("diverged", 6)]


@pytest.mark.parametrize("engine", [EAGER, TRACED, STACKED, NATIVE], ids=str)
@pytest.mark.parametrize("fields", [{**SGD, "evaluate_every": 4}, ADAM], ids=["sgd", "adam"])
def test_a_fleet_goes_on_from_its_checkpoint_with_the_same_bits(splits, tmp_path, engine, fields):
    recipe, arm = Recipe(epochs=3, drop_last=False, **fields), "batch+dropout:0.5"
    replicas = [Replica(arm, 0.01, seed, DECAY) for seed in range(2)]

    def make():
        return Fleet([build(arm, seed) for seed in range(2)], replicas, recipe, splits, engine)

    whole = make()
    expected = [event[:3] for event in whole.train()]
    first, path = make(), tmp_path / "fleet.safetensors"
    events = first.train(path)
    while not path.exists():
        next(events)
    seen = list(first.events)
    events.close()
    second = make()
    again = list(second.train(path))
    assert again[: len(seen)] == seen
    assert [event[:3] for event in again] == expected
    for r in range(2):
        assert same_bits(second.state(r), whole.state(r))


def test_torchs_batch_norm_is_as_exact_in_a_fleet_as_on_planar_images(splits):
    """On images with channels last it is wrong in the fifth digit."""
    recipe = Recipe(network="lenet", activation="sigmoid", batch_size=210, **SGD)

    def statistics(arm, dtype):
        network = build_network(
            "lenet", arm, 0, image_shape=(1, 28, 28), classes=10, activation="sigmoid"
        ).to(dtype)
        fleet = Fleet([network], [Replica(arm, 0.05, 0)], recipe, splits, TRACED)
        fleet.advance(1)
        return fleet.state(0)["conv0.norm.running_var"].double()

    exact = statistics("torch-batch", torch.float64)
    for arm in ("torch-batch", "batch"):
        torch.testing.assert_close(statistics(arm, torch.float32), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("engine", [EAGER, STACKED, NATIVE], ids=str)
def test_histograms_show_what_is_inside_each_replica_after_each_epoch(splits, engine):
    replicas = [Replica("batch", 0.01, seed) for seed in range(2)]
    recipe = Recipe(epochs=2, evaluate_every=4, drop_last=False)
    fleet = Fleet([build("batch", seed) for seed in range(2)], replicas, recipe, splits, engine)
    seen = {True: 0, False: 0}
    assert len(splits.indices["train"]) < 2 * 128
    x = scale(splits.dataset.images[splits.indices["train"][:128]], recipe.scaling)
    for event in fleet.train():
        if isinstance(event, Outcome):
            continue
        ends = event.step % fleet.steps_per_epoch == 0
        seen[ends] += 1
        state = fleet.state(replicas.index(event.replica))
        assert event.histograms == (inside(build("batch").eval(), state, x) if ends else {})
    assert seen[True] == 4
    assert seen[False] > 0


@pytest.mark.parametrize("engine", [EAGER, TRACED, NATIVE], ids=str)
def test_a_fleet_that_gets_the_passes_of_another_is_trained_as_without(splits, engine):
    def trained(seed, passes):
        replicas = [Replica("batch", 0.01, seed)]
        fleet = Fleet([build("batch", seed)], replicas, Recipe(epochs=1), splits, engine, passes)
        list(fleet.train())
        return fleet.state(0)

    passes = {}
    trained(0, passes)
    assert same_bits(trained(1, passes), trained(1, {}))


@pytest.mark.parametrize("engine", [TRACED, STACKED, NATIVE], ids=str)
def test_a_fleet_goes_on_without_the_replica_that_diverged(splits, tmp_path, engine):
    recipe = Recipe(epochs=3, optimizer="sgd")
    replicas = [Replica("plain", lr, 0, 1.0) for lr in (0.1, 1e30)]

    def make():
        return Fleet([build("plain"), build("plain")], replicas, recipe, splits, engine)

    whole, path = [event[:3] for event in make().train()], tmp_path / "fleet.safetensors"
    events = make().train(path)
    while not path.exists():
        next(events)
    again = list(make().train(path))
    assert [event[:3] for event in again] == whole
    assert [event.status for event in again if isinstance(event, Outcome)] == ["diverged", "done"]


def test_a_checkpoint_of_something_else_is_refused(splits, tmp_path):
    path = tmp_path / "fleet.safetensors"
    recipe, replicas = Recipe(epochs=2), [Replica("plain", 0.01, 0)]

    def make(engine=TRACED):
        return Fleet([build("plain")], replicas, recipe, splits, engine)

    path.write_bytes(b"no checkpoint")
    with pytest.raises(NormlabError, match=r"fleet.safetensors is no checkpoint of this run"):
        list(make().train(path))
    path.unlink()
    events = make().train(path)
    next(events), next(events)
    with pytest.raises(NormlabError, match="made by another engine, looped, traced"):
        list(make(EAGER).train(path))


@pytest.mark.parametrize("engine", [EAGER, TRACED, NATIVE], ids=str)
@pytest.mark.parametrize("changed", [{"momentum": 0.0}, {"decay": 0.0}], ids=str)
def test_the_optimizers_numbers_matter(splits, changed, engine):
    def trained(momentum=0.5, decay=0.1):
        recipe = Recipe(epochs=1, optimizer="sgd", momentum=momentum)
        network, _ = run(splits, recipe, "plain", decay=decay, engine=engine)
        return bits(network)

    assert not same_bits(trained(), trained(**changed))


@pytest.mark.parametrize(
    ("drop_last", "sizes"), [(True, [32] * 6), (False, [32] * 6 + [18])], ids=["whole", "all"]
)
def test_an_epochs_last_smaller_batch_is_left_out_or_used(splits, drop_last, sizes):
    network = build("batch")
    watch = Watch(network)
    recipe = Recipe(epochs=2, drop_last=drop_last)
    *_, outcome = train(network, Replica("batch", 0.01, 0), recipe, splits)
    assert [len(batch) for batch in watch.trained_on] == sizes * 2
    assert outcome.step == len(sizes) * 2
    assert network.hidden0.norm.num_batches_tracked == len(sizes) * 2


def test_an_epoch_sees_every_training_image_once_and_no_other_in_a_new_order(splits):
    network = build("plain")
    watch = Watch(network)
    recipe = Recipe(epochs=2, drop_last=False)
    list(train(network, Replica("plain", 0.01, 0), recipe, splits))
    first, second = torch.cat(watch.trained_on).mul(255).round().split(210)
    expected = splits.dataset.images[splits.indices["train"]].float()
    assert not first.equal(second)
    for epoch in (first, second):
        assert not epoch.equal(expected)
        assert sorted(epoch.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


def test_arms_of_one_seed_see_the_same_batches_in_the_same_order(splits):
    recipe, seen = Recipe(epochs=2, evaluate_every=4), {}
    for arm, seed in [("plain", 3), ("batch+dropout:0.5", 3), ("plain", 4)]:
        network = build(arm, seed)
        watch = Watch(network)
        list(train(network, Replica(arm, 0.01, seed), recipe, splits))
        seen[arm, seed] = torch.stack(watch.trained_on)
    assert seen["plain", 3].equal(seen["batch+dropout:0.5", 3])
    assert not seen["plain", 3].equal(seen["plain", 4])


@pytest.mark.parametrize(
    ("every", "steps", "epochs"),
    [
        (0, [6, 12], [1, 2]),
        (4, [4, 6, 10, 12], [0, 1, 1, 2]),
        (3, [3, 6, 9, 12], [0, 1, 1, 2]),
        (6, [6, 12], [1, 2]),
        (1, list(range(1, 13)), [0] * 5 + [1] * 6 + [2]),
        (1000, [6, 12], [1, 2]),
    ],
)
def test_evaluation_comes_at_the_declared_steps_and_at_the_ends_of_epochs(
    splits, every, steps, epochs
):
    _, events = run(splits, Recipe(epochs=2, evaluate_every=every), "plain")
    assert [m.step for m in measurements(events)] == steps
    assert [m.epoch for m in measurements(events)] == epochs
    assert events[-1].status == "done"
    assert events[-1].step == 12


@pytest.mark.parametrize("arm", ["batch+dropout:0.5", "torch-batch"])
def test_evaluation_does_not_change_training(splits, arm):
    seldom, few = run(splits, Recipe(epochs=2, evaluate_every=0), arm)
    often, many = run(splits, Recipe(epochs=2, evaluate_every=1), arm)
    assert same_bits(bits(seldom), bits(often))
    assert measurements(few) == [m for m in measurements(many) if m.step in (6, 12)]


def test_evaluation_is_in_eval_mode_and_training_in_train_mode(splits):
    network = build("batch+dropout:0.5").eval()
    watch = Watch(network)
    recipe = Recipe(epochs=2, evaluate_every=4)
    for event in train(network, Replica("batch+dropout:0.5", 0.01, 0), recipe, splits):
        if isinstance(event, Measurement):
            assert len(watch.trained_on) == event.step
    assert len(watch.trained_on) == 12
    # Four times all splits, and after each epoch what histograms are made of.
    assert len(watch.evaluated_on) == 4 * len(splits.indices) + 2
    assert all(module.training for module in network.modules())


def test_every_split_is_measured_on_its_own_images(splits):
    network, events = run(splits, Recipe(epochs=1))
    values = measurements(events)[-1].values
    images, labels = splits.dataset.images, splits.dataset.labels
    assert len(values) == 6 + 2  # Those of the epoch's batches.
    for name, indices in splits.indices.items():
        expected = evaluate(network, images, labels, indices, "0..1")
        assert (values[name, "loss"], values[name, "accuracy"]) == expected
    assert len(set(values.values())) == 6 + 2


@pytest.fixture
def trained(splits):
    """A network whose running statistics are far from a batch's own."""
    network, _ = run(splits, Recipe(epochs=1))
    network.hidden0.norm.running_mean += 1
    network.hidden1.norm.running_var *= 3
    return network.train()


def evaluated(network, splits, indices):
    return evaluate(network, splits.dataset.images, splits.dataset.labels, indices, "0..1")


def test_evaluation_uses_the_running_statistics_and_no_dropout(trained, splits):
    state, indices = bits(trained), splits.indices["test"]
    x = splits.dataset.images[indices].flatten(1).double() / 255
    for hidden in ("hidden0", "hidden1"):
        value = {
            name.removeprefix(f"{hidden}."): tensor.double()
            for name, tensor in state.items()
            if name.startswith(hidden)
        }
        x = x @ value["linear.weight"].T + value["linear.bias"]
        x = (x - value["norm.running_mean"]) / (value["norm.running_var"] + 1e-5).sqrt()
        x = (x * value["norm.weight"] + value["norm.bias"]).clamp(min=0)
    logits = x @ state["output.weight"].double().T + state["output.bias"]
    labels = splits.dataset.labels[indices]
    picked = logits.log_softmax(1)[range(len(labels)), labels]
    loss, accuracy = evaluated(trained, splits, indices)
    assert loss == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_evaluation_moves_nothing_and_leaves_eval_mode(trained, splits):
    before, random = bits(trained), torch.get_rng_state()
    images = splits.dataset.images.clone()
    first = evaluated(trained, splits, splits.indices["test"])
    assert same_bits(before, bits(trained))
    assert torch.get_rng_state().equal(random)
    assert splits.dataset.images.equal(images)
    assert not any(module.training for module in trained.modules())
    assert evaluated(trained.train(), splits, splits.indices["test"]) == first


@pytest.mark.parametrize("size", [1, 7, 39, 40, 41])
def test_evaluation_does_not_depend_on_its_batches(trained, splits, monkeypatch, size):
    indices = splits.indices["test"]
    alone = [evaluated(trained, splits, indices[i : i + 1]) for i in range(len(indices))]
    monkeypatch.setattr("normlab.training.evaluation.EVALUATION_BATCH", size)
    watch = Watch(trained)
    loss, accuracy = evaluated(trained, splits, indices)
    # The mean of the samples' own losses, in which a batch's mean would weigh 5 as much as 7.
    assert loss == pytest.approx(math.fsum(loss for loss, _ in alone) / 40, rel=1e-6)
    assert accuracy == pytest.approx(math.fsum(accuracy for _, accuracy in alone) / 40, rel=1e-12)
    assert len(watch.evaluated_on[0]) == min(size, 40)
    assert torch.cat(watch.evaluated_on).equal(splits.dataset.images[indices].float().mul(1 / 255))


def test_evaluation_reads_the_scaling(trained, splits):
    images, labels, indices = splits.dataset.images, splits.dataset.labels, splits.indices["test"]
    watch = Watch(trained)
    evaluate(trained, images, labels, indices, "-1..1")
    assert float(watch.evaluated_on[0].min()) == pytest.approx(-1)
    assert float(watch.evaluated_on[0].max()) == pytest.approx(1)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("every", [0, 1])
def test_a_replica_that_diverges_says_so_and_stops(splits, arm, every):
    network = build(arm)
    watch = Watch(network)
    # Each step makes the weights nine times as large, with the other sign.
    recipe = Recipe(epochs=50, optimizer="sgd", evaluate_every=every)
    events = list(train(network, Replica(arm, 10, 0, 1.0), recipe, splits))
    for measurement in measurements(events):
        assert all(map(math.isfinite, measurement.values.values()))
    assert events[-1].status == "diverged"
    assert events[-1].step == len(watch.trained_on) <= 24
    assert len(events) == events[-1].step if every else events[-1].step // 6


class Shrugs(nn.Module):
    """Loses more than a number holds in one training step, learns nothing, and evaluates well."""

    def __init__(self, step):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.weight.register_hook(torch.zeros_like)
        self.step, self.steps = step, 0

    def forward(self, x):
        self.steps += self.training
        logits = self.weight.expand(len(x), 10)
        return logits * math.nan if self.training and self.steps == self.step else logits


def test_a_loss_that_is_no_number_between_two_evaluations_is_not_forgotten(splits):
    recipe = Recipe(epochs=5, optimizer="sgd")
    events = list(train(Shrugs(8), Replica("plain", 0.1, 0), recipe, splits))
    assert [m.step for m in measurements(events)] == [6]
    assert events[-1][1:3] == ("diverged", 12)


def test_an_evaluation_that_is_no_number_is_not_measured(splits):
    network = build("batch")

    def spoil(_, inputs, output):
        return output if torch.is_grad_enabled() or len(inputs[0]) != 30 else output * math.inf

    network.register_forward_hook(spoil)
    events = list(train(network, Replica("batch", 0.1, 0), Recipe(epochs=2), splits))
    assert [event[1:3] for event in events] == [("diverged", 6)]


def test_a_seed_gives_the_same_bits_whatever_the_global_generator(splits):
    recipe = Recipe(epochs=2, evaluate_every=4)
    torch.manual_seed(1)
    first, one = run(splits, recipe)
    torch.manual_seed(2)
    torch.rand(5)
    second, other = run(splits, recipe)
    assert same_bits(bits(first), bits(second))
    assert measurements(one) == measurements(other)


def test_another_seed_gives_other_numbers_from_the_same_first_values(splits):
    recipe, finals = Recipe(epochs=1), []
    for seed in (0, 1):
        network = build("dropout:0.5", seed=0)
        list(train(network, Replica("dropout:0.5", 0.01, seed), recipe, splits))
        finals.append(bits(network))
    assert not same_bits(*finals)


@pytest.mark.parametrize("arm", ["plain", "batch+dropout:0.5"])
def test_the_global_generator_is_left_alone(splits, arm):
    before = torch.get_rng_state()
    run(splits, Recipe(epochs=1, evaluate_every=2), arm)
    assert torch.get_rng_state().equal(before)


def test_training_leaves_the_data_alone(splits):
    images, labels = splits.dataset.images.clone(), splits.dataset.labels.clone()
    indices = {name: index.clone() for name, index in splits.indices.items()}
    run(splits, Recipe(epochs=2))
    assert splits.dataset.images.equal(images)
    assert splits.dataset.labels.equal(labels)
    assert same_bits(splits.indices, indices)


def test_a_replica_learns(splits):
    _, events = run(splits, Recipe(epochs=20), "batch")
    first, *_, last = measurements(events)
    assert last.values["train", "loss"] < first.values["train", "loss"] / 5
    assert last.values["train", "accuracy"] > 0.97
    assert 0.6 < last.values["test", "accuracy"] <= last.values["train", "accuracy"]


def test_the_time_of_a_replica_includes_its_evaluations(splits, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("normlab.training.fleet.time.perf_counter", lambda: next(now) * 1.5)
    _, events = run(splits, Recipe(epochs=1))
    assert events[-1].seconds == 1.5
