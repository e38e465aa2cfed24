"""Faults planted in a ResNet-18 of timm's, which knows nothing of normlab."""

import copy

import pytest
import torch
import torch.nn.functional as F

from normlab import diagnose

pytestmark = pytest.mark.slow

STEPS, SIZE = 60, 64


def draw(samples, seed):
    """Images of ten patterns under noise, of which a network learns something at once."""
    patterns = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (samples,), generator=g)
    images = patterns[labels] / 2 + torch.randn(samples, 3, 32, 32, generator=g)
    return list(zip(images.split(SIZE), labels.split(SIZE), strict=True))


@pytest.fixture(scope="module")
def resnet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step, (x, y) in enumerate(draw(STEPS * SIZE, 0)):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def batches():
    return draw(512, 1000)


def heavy(diagnosis):
    return {
        (each.signal, each.layer): each.weight
        for each in diagnosis.findings
        if each.weight != "information"
    }


def test_a_healthy_network_gives_nothing(resnet, batches):
    assert heavy(diagnose(resnet, batches, steps=STEPS)) == {}
    assert all(torch.isfinite(each).all() for each in resnet.state_dict().values())


def stale(model):
    norm = model.layer2[0].bn1
    norm.running_mean += 2 * norm.running_var.sqrt()


def not_finite(model):
    model.layer1[0].bn2.running_var[3] = float("inf")


def never(model):
    model.layer3[0].downsample[1].reset_running_stats()


def momentum(model):
    model.layer4[1].bn2.momentum = 0.9


def dead(model):
    model.layer1[0].bn1.bias[:40] = -20


def collapsed(model):
    model.layer2[1].bn1.weight[:60] = 1e-4
    model.layer2[1].bn1.bias[:60] = 1


FAULTS = [
    (stale, "stale statistics", "layer2.0.bn1", True),
    (not_finite, "not finite", "layer1.0.bn2", True),
    (never, "never updated", "layer3.0.downsample.1", True),
    (momentum, "momentum convention", "layer4.1.bn2", True),
    (dead, "dead units", "layer1.0.act1", False),
    (collapsed, "γ collapse", "layer2.1.bn1", False),
]


@pytest.mark.parametrize(("plant", "signal", "layer", "mended"), FAULTS)
def test_a_planted_fault_is_found(resnet, batches, plant, signal, layer, mended):
    model = copy.deepcopy(resnet)
    with torch.no_grad():
        plant(model)
    diagnosis = diagnose(model, batches)
    found = heavy(diagnosis)
    assert (signal, layer) in found
    assert {each for each, _ in found} <= {signal, "train/eval gap", "stale statistics"}
    if mended:
        assert heavy(diagnosis.fixed().after) == {}
