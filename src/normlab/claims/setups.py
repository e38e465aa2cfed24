"""The studies that claims share, so that what two of them need is trained once."""

from __future__ import annotations

from normlab.study import Study, bundled_studies

__all__ = ["alone", "mnist_sigmoid", "tutorial"]

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
