"""Folding of published architectures, as timm builds them; `pytest -s` shows a table."""

import statistics
import time
import warnings

import pytest
import torch
from torch import nn

import normlab

# How many batch norms there are, and how many must stay: those that normalize a sum, what is
# joined or what was activated, or whose input is the block's own.
NETWORKS = {
    "resnet18": (20, 0),
    "resnet50": (53, 0),
    "resnext50_32x4d": (53, 0),
    "densenet121": (121, 62),
    "mobilenetv2_100": (52, 0),
    "mobilenetv3_small_100": (34, 0),
    "efficientnet_b0": (49, 0),
    "tf_efficientnet_b0": (49, 0),  # Its convolutions pad by themselves.
    "regnetx_002": (44, 0),
    "regnety_002": (44, 0),
    "vgg11_bn": (8, 0),
    "inception_v3": (94, 0),
    "xception41": (84, 0),
    "ghostnet_100": (80, 0),
    "hrnet_w18_small": (91, 0),
    "dla34": (37, 0),
    "res2net50_26w_4s": (85, 0),
    "mnasnet_100": (52, 0),
    "repvgg_a0": (61, 17),
    "darknet53": (52, 0),
    "cspresnet50": (55, 0),
    "convmixer_768_32": (65, 65),
    "selecsls42b": (41, 0),
    "levit_128s": (52, 0),  # Linear layers over tokens.
    "resnetv2_50": (49, 17),
}
SIDES = {"inception_v3": 96, "levit_128s": 224}


def build(name):
    """A network in evaluation with random batch norms, and an example."""
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")  # timm's own, and of what it imports.
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0, 0.1, generator=generator)
    side = SIDES.get(name, 64)
    return model, torch.randn(2, 3, side, side, generator=generator)


def milliseconds(models, x, runs=5):
    """The median of a few runs in turn, after one that does not count."""
    taken = [[] for _ in models]
    for _ in range(runs + 1):
        for model, times in zip(models, taken, strict=True):
            start = time.perf_counter()
            model(x)
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times[1:]) for times in taken]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_architecture(name):
    model, x = build(name)
    folded, report = normlab.fold(model, x)
    other = x.flip(0, 3) + 0.5
    with torch.no_grad():
        expected, found = model(other), folded(other)
        before, after = milliseconds((model, folded), x)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    relative = 0.0 if report.certificate is None else report.certificate.relative_largest
    counts = (len(report.folded) + len(report.left), len(report.left))
    print(
        f"\n| {name} | {counts[0]} | {len(report.folded)} | {counts[1]} | {relative:.1e} | "
        f"{error:.1e} | {before:.1f} | {after:.1f} |"
    )
    for why in sorted(set(report.left.values())):
        print(f"  left: {why}")
    assert counts == NETWORKS[name]
    assert relative < 2e-5
    assert error < 2e-5
