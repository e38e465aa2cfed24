import pytest
import torch
import torch.nn.functional as F

from normlab.data import load, scale
from normlab.networks import build_network
from normlab.streams import stream


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
