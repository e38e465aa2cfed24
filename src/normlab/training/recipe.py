"""What a training run is made of, apart from its arm, setting and seed."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from normlab.data import SCALINGS, check_dataset
from normlab.errors import InputError, did_you_mean
from normlab.imports import is_function
from normlab.networks import ACTIVATIONS, INITS, check_network
from normlab.probes import PROBES, Histogram

__all__ = ["FleetEvent", "Measurement", "Outcome", "Reading", "Recipe", "Replica", "Setting"]


class Setting(NamedTuple):
    """What can be tried of an optimizer's numbers.

    Attributes:
        lr: Learning rate.
        weight_decay: L2 penalty, added to the gradient of every parameter as in torch.
    """

    lr: float
    weight_decay: float = 0.0

    def __str__(self) -> str:
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"lr {self.lr:g}{decay}"


class Replica(NamedTuple):
    """One training run."""

    arm: str
    lr: float
    seed: int
    weight_decay: float = 0.0

    @property
    def setting(self) -> Setting:
        """Its numbers of the optimizer."""
        return Setting(self.lr, self.weight_decay)

    def __str__(self) -> str:
        return f"{self.arm}, {self.setting}, seed {self.seed}"


class Measurement(NamedTuple):
    """What one evaluation of a replica saw.

    Attributes:
        replica: Which one.
        step: Optimizer steps taken.
        epoch: Epochs finished.
        values: (split, metric) to value; metrics are `loss` (mean cross-entropy, nats) and
            `accuracy` (a share). The splits are the data's, in eval mode, and `batches`: those of
            the epoch so far, as they were in training, each before its step.
        histograms: At the end of an epoch what `normlab.probes.inside` sees in eval mode, of some
            training images; empty before.
    """

    replica: Replica
    step: int
    epoch: int
    values: dict[tuple[str, str], float]
    histograms: dict[str, dict[str, Histogram]] = {}  # noqa: RUF012 - nobody adds to it


class Reading(NamedTuple):
    """What the probes of a replica read.

    Attributes:
        replica: Which one.
        step: Optimizer steps taken.
        epoch: Epochs finished.
        values: By probe, layer (`""` is the whole network) and name, as `normlab.probes.read` gives
            them.
    """

    replica: Replica
    step: int
    epoch: int
    values: dict[str, dict[str, dict[str, float]]]


class Outcome(NamedTuple):
    """How a replica ended.

    Attributes:
        replica: Which one.
        status: `done`, or `diverged` if its loss ceased to be a finite number.
        step: The last step at which it was looked at.
        seconds: Wall-clock time it took, evaluation and probes included.
        learned: Of each norm layer, by its name in the network: `weight` (γ), `bias` (β),
            `running_mean` and `running_var`, as far as it has them; empty if it diverged.
    """

    replica: Replica
    status: Literal["done", "diverged"]
    step: int
    seconds: float
    learned: dict[str, dict[str, list[float]]] = {}  # noqa: RUF012 - nobody adds to it


FleetEvent = Measurement | Reading | Outcome
"""What the training of a fleet tells."""


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Recipe(BaseModel):
    """Data, network and optimizer: what all the replicas of a study have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str = Field(
        "mnist",
        description="mnist, fashion-mnist or cifar10; or your own data: FILE.npz, a folder of "
        "images by class, or module:function.",
    )
    validation: int = Field(
        5000,
        ge=0,
        description="Training images held out for choices, so that none is made on the test set.",
    )
    scaling: str = Field("0..1", description="Range that bytes are scaled to: 0..1 or -1..1.")
    network: str = Field(
        "mlp:32,32",
        description="mlp:SIZES, cnn:CHANNELS, lenet, resnet18, or module:function of your own.",
    )
    activation: str = Field("relu", description="Activation of the hidden layers.")
    init: str = Field(
        "torch", description="First weights: torch's own scheme, or xavier, which some texts use."
    )
    optimizer: str = Field(
        "adam", description="adam, which forgives a wrong learning rate most, or sgd."
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of sgd; plain sgd has none.")
    batch_size: int = Field(32, ge=1, description="Samples in a batch; it sets batch norm's noise.")
    drop_last: bool = Field(
        True,
        description="Leave out an epoch's last, smaller batch: its statistics are noisier.",
    )
    precision: str = Field(
        "float32",
        description="Of training's matrix products and convolutions: float32, or bfloat16, all "
        "else and the weights in float32; an arm's own goes first, as in batch+bfloat16.",
    )
    epochs: int = Field(10, ge=1, description="Times that the training set is seen.")
    evaluate_every: int = Field(
        0, ge=0, description="Evaluate every so many steps of an epoch too; 0 for its end alone."
    )
    probes: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        (), description=f"What is measured inside every replica: {', '.join(PROBES)}."
    )
    probe_every: int = Field(
        0, ge=0, description="Probe at step 0 and every so many steps; 0 for the end of each epoch."
    )

    @field_validator("dataset")
    @classmethod
    def _is_a_dataset(cls, value: str) -> str:
        check_dataset(value)
        return value

    @field_validator("scaling", "activation", "init", "optimizer", "precision")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        known = {
            "scaling": list(SCALINGS),
            "activation": list(ACTIVATIONS),
            "init": list(INITS),
            "optimizer": ["adam", "sgd"],
            "precision": ["float32", "bfloat16"],
        }[str(info.field_name)]
        if value not in known:
            raise InputError(
                f"unknown {info.field_name} {value!r}{did_you_mean(value, known)}: "
                f"known are {', '.join(known)}"
            )
        return value

    @field_validator("probes")
    @classmethod
    def _are_probes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in PROBES:
                raise InputError(
                    f"unknown probe {name!r}{did_you_mean(name, PROBES)}: "
                    f"known are {', '.join(PROBES)}"
                )
        if len(set(value)) < len(value):
            raise InputError("each may be named once")
        return value

    @field_validator("network")
    @classmethod
    def _is_a_network(cls, value: str) -> str:
        if not is_function(value) or value.startswith(("mlp:", "cnn:")):
            check_network(value)
        return value

    @model_validator(mode="after")
    def _own_networks_are_as_they_are(self) -> Recipe:
        if is_function(self.network):
            for name in ("activation", "init"):
                if getattr(self, name) != Recipe.model_fields[name].default:
                    raise InputError(
                        f"{name}={getattr(self, name)!r} belongs to normlab's own networks, not "
                        f"{self.network}: leave it at {Recipe.model_fields[name].default!r}"
                    )
        return self

    @model_validator(mode="after")
    def _momentum_has_an_optimizer(self) -> Recipe:
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"momentum={self.momentum} belongs to sgd, not {self.optimizer}")
        return self

    @model_validator(mode="after")
    def _interval_has_probes(self) -> Recipe:
        if self.probe_every and not self.probes:
            raise InputError(f"probe_every={self.probe_every} belongs to probes: name some")
        return self

    def steps_per_epoch(self, train_size: int) -> int:
        """Return how many batches an epoch has."""
        if self.drop_last:
            return train_size // self.batch_size
        return math.ceil(train_size / self.batch_size)
