"""What claims are tested on, where several share it: a study is trained once for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normlab.data import load
from normlab.study import Study, bundled_studies

__all__ = [
    "alone",
    "deep_linear",
    "deep_linear_inside",
    "fashion_fields",
    "fashion_inside",
    "fashion_part",
    "fashion_relu",
    "mnist_sigmoid",
    "tutorial",
]

_PART = 16_000
_PERCEPTRON = "mlp:128,128,128,128"
_DEPTH, _WIDTH = 25, 64
_QUICK_EPOCHS = {
    "mnist-mlp-sgd": 1,
    "mnist-mlp-adam": 2,
    "mnist-solver": 2,
    "cifar10-mlp-dropout": 1,
    "fashion-lenet-sigmoid": 2,
}


def mnist_sigmoid(quick: bool) -> Study:
    """Return Ioffe and Szegedy's small experiment: three layers of 100 sigmoids on MNIST.

    They give the network, the batches of 60 and the 50,000 steps; of the learning rate they say
    nothing. At 1 both networks learn.

    >>> study = mnist_sigmoid(quick=False)
    >>> study.epochs * study.steps_per_epoch(55_000)
    50380
    """
    return Study(
        name="mnist-sigmoid",
        description="Three layers of 100 sigmoids on MNIST, with and without batch norm",
        network="mlp:100,100,100",
        activation="sigmoid",
        optimizer="sgd",
        lr=(1.0,),
        batch_size=60,
        epochs=6 if quick else 55,
    )


def tutorial(name: str, quick: bool) -> Study:
    """Return the bundled study of a tutorial: as it is, or with one or two epochs.

    Args:
        name: Of the study.
        quick: Whether fewer epochs will do.

    >>> tutorial("mnist-mlp-adam", quick=False) == bundled_studies()["mnist-mlp-adam"]
    True
    """
    study = bundled_studies()[name]
    return study.with_fields({"epochs": _QUICK_EPOCHS[name]}) if quick else study


def alone(study: Study, arm: str) -> Study:
    """Return a study of one more arm, whose replicas pair with those of the study seed by seed.

    All that a replica draws comes from its seed and its network, and nothing from the study. So an
    arm can be added while what was trained of the others stays valid.

    >>> alone(tutorial("mnist-mlp-adam", quick=True), "layer").arms
    ('layer',)
    """
    rest = {"description": "", "published": (), "protocol": {}}
    return study.with_fields({**rest, "name": f"{study.name}-more", "arms": (arm,)})


def fashion_part() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Fashion-MNIST with no more than 16,000 training images, for quick runs."""
    whole = load("fashion-mnist", progress=False)
    first, tests = slice(_PART), slice(whole.train_size, None)
    return whole.images[first], whole.labels[first], whole.images[tests], whole.labels[tests]


def fashion_fields(quick: bool, *, epochs: int, quick_epochs: int) -> dict[str, Any]:
    """Return the fields of a study on Fashion-MNIST: data, optimizer, batch and length.

    Args:
        quick: Whether 15,000 training images will do, in place of 55,000.
        epochs: In a full run.
        quick_epochs: In a quick one.
    """
    fields = {"optimizer": "sgd", "batch_size": 128}
    if quick:
        dataset = f"{__name__}:{fashion_part.__name__}"
        return {**fields, "dataset": dataset, "validation": 1000, "epochs": quick_epochs}
    return {**fields, "dataset": "fashion-mnist", "validation": 5000, "epochs": epochs}


def fashion_relu(quick: bool) -> Study:
    """Return a perceptron of 4×128 ReLUs on Fashion-MNIST, at rates that double.

    Args:
        quick: Two epochs of 15,000 images in place of five of 55,000.

    >>> fashion_relu(quick=False).lr[0], fashion_relu(quick=False).lr[-1]
    (0.0625, 32.0)
    """
    return Study(
        name="claims-fashion-relu",
        network=_PERCEPTRON,
        lr=tuple(2.0**k for k in range(-4, 6)),
        **fashion_fields(quick, epochs=5, quick_epochs=2),
    )


def fashion_inside(quick: bool) -> Study:
    """Return the same perceptron at one rate, with probes of its gradients and its loss.

    Args:
        quick: 234 steps with a reading every 26, in place of 2,145 with one every 65.
    """
    return Study(
        name="claims-fashion-inside",
        network=_PERCEPTRON,
        lr=0.1,
        probes=("covariate-shift", "smoothness"),
        probe_every=26 if quick else 65,
        **fashion_fields(quick, epochs=5, quick_epochs=2),
    )


def deep_linear() -> nn.Sequential:
    """Return a network of 25 linear layers of 64 with batch norms, and nothing that is not linear.

    Orthogonal weights keep signals and gradients at one size without batch norms, too: with
    other ones it would not train, and there would be nothing to compare.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(_DEPTH):
        layers += [nn.Linear(_WIDTH if i else 784, _WIDTH), nn.BatchNorm1d(_WIDTH)]
    network = nn.Sequential(*layers, nn.Linear(_WIDTH, 10))
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def deep_linear_inside(quick: bool) -> Study:
    """Return the study of `deep_linear`, with probes of its gradients.

    Each of the many layers costs a pass through all of them, so it is read less often.

    Args:
        quick: 117 steps with a reading every 39, in place of 2,145 with one every 195.
    """
    return Study(
        name="claims-deep-linear",
        network=f"{__name__}:{deep_linear.__name__}",
        lr=0.01,
        probes="covariate-shift",
        probe_every=39 if quick else 195,
        **fashion_fields(quick, epochs=5, quick_epochs=1),
    )
