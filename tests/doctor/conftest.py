import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.data import load, scale
from normlab.doctor import SIGNALS
from normlab.doctor.finding import MissingError
from normlab.doctor.observations import Layer, Observations
from normlab.networks import build_network
from normlab.probes import Moments
from normlab.streams import stream

MANY = 4096.0


def moments(mean, var, n=MANY):
    return Moments(*(torch.tensor(each, dtype=torch.float64) for each in (mean, var)), n)


def observed(*rows, module=None, held=False, **options):
    """What is observed of one trained layer whose batches have moments that fit its own."""
    rows = rows or (moments([0.0], [1.0]),) * 8
    module = module or nn.BatchNorm1d(len(rows[0].mean))
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(1000)
    least = min(each.n for each in rows)
    layer = Layer("norm", module, held, True, calls=[list(rows)], least=least)
    return Observations({"norm": layer}, batches=len(rows), **options)


def buffers(**values):
    """A layer of as many channels as there are values of each."""
    count = max(map(len, values.values()))
    module = nn.BatchNorm1d(count)
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.tensor(value))
    return module


def weight_of(signal, seen):
    try:
        found = [each.weight for each in SIGNALS[signal](seen)]
    except MissingError:
        return MissingError
    assert len(found) < 2
    return found[0] if found else None


def labelled(count, size):
    """Batches of six numbers a sample, of three classes."""
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=g), torch.randint(3, (size,), generator=g))
        for _ in range(count)
    ]


def train(seed, arm="batch", activation="relu", images=6000, size=100):
    """LeNet after one pass over some of MNIST, with a learning rate that falls to nothing."""
    dataset = load("mnist")
    network = build_network(
        "lenet", arm, seed, image_shape=(1, 28, 28), classes=10, activation=activation
    )
    x, y = scale(dataset.images[:images], "0..1"), dataset.labels[:images]
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    parts = torch.randperm(images, generator=stream(seed, "order")).split(size)
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / len(parts))
        optimizer.zero_grad()
        F.cross_entropy(network(x[part]), y[part]).backward()
        optimizer.step()
    return network


def draw(seed, samples=1024, size=128):
    """Batches of images that the network was not trained on."""
    dataset = load("mnist")
    order = 50000 + torch.randperm(10000, generator=stream(seed, "batches"))[:samples]
    return [
        (scale(dataset.images[part], "0..1"), dataset.labels[part]) for part in order.split(size)
    ]


@pytest.fixture(scope="session")
def lenet():
    return train(0)


@pytest.fixture(scope="session")
def other_lenet():
    return train(1)


@pytest.fixture(scope="session")
def batches():
    return draw(0)
