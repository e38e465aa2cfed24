"""A study: everything that is declared before anything runs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from torch import nn

from normlab.data import Splits
from normlab.errors import InputError, did_you_mean
from normlab.networks import parse_arm
from normlab.study.published import PublishedFigure
from normlab.training import Recipe, Replica, Setting
from normlab.training.networks import build_checked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FOR_PEOPLE", "Study", "bundled_studies", "find_study"]


_MOST_SEEDS = 10_000
FOR_PEOPLE = ("name", "description", "published", "protocol")
"""Fields that make no difference to what is measured."""
_OF_THE_TEXT = (
    *("dataset", "scaling", "network", "activation", "init", "optimizer", "lr", "momentum"),
    *("weight_decay", "batch_size", "drop_last", "precision"),
)
"""Fields with which a study is another than that which its text is about."""


def _seeds(value: object) -> object:
    """A single number is how many seeds there are, starting at 0; a list names them."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= _MOST_SEEDS:
            raise InputError(f"{value} seeds: from 1 to {_MOST_SEEDS} can be asked for")
        return tuple(range(value))
    if isinstance(value, str):
        raise InputError(f"expected a number of seeds or a list of them, got {value!r}")
    return value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, (str, int, float)) else value


_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Study(Recipe):
    """What is compared, on what, how often, and what difference would matter.

    Frozen, checked when it is made, and the same in TOML: `Study.from_toml(study.to_toml())`
    gives the study back.

    >>> Study(name="mine", arms=["plain", "batch"], seeds=5).seeds
    (0, 1, 2, 3, 4)
    """

    name: str = Field(
        "study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder."
    )
    description: str = Field("", description="One line for people.")
    arms: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        ("plain", "batch"),
        min_length=1,
        description="Variants of the network; the first is the baseline of every comparison.",
    )
    lr: Annotated[tuple[_Rate, ...], BeforeValidator(_one_or_more)] = Field(
        (0.01,),
        min_length=1,
        description="Learning rates, the same for every arm; with several, each arm is reported at "
        "the rate that is best on validation data by its other seeds.",
    )
    weight_decay: Annotated[tuple[_Decay, ...], BeforeValidator(_one_or_more)] = Field(
        (0.0,),
        min_length=1,
        description="L2 penalties, added to the gradient of every parameter as in torch; several "
        "are tried with every learning rate, and chosen along with it.",
    )
    seeds: Annotated[tuple[_Seed, ...], BeforeValidator(_seeds)] = Field(
        tuple(range(10)),
        min_length=1,
        description="How many seeds, or which; ten find a difference of one standard deviation "
        "four times in five.",
    )
    target_accuracy: float = Field(
        0.95, gt=0, le=1, description="Test accuracy whose first step is compared."
    )
    margin_accuracy: float = Field(
        0.005, gt=0, description="Largest difference in accuracy that does not matter (a share)."
    )
    margin_loss: float = Field(
        0.02, gt=0, description="Largest difference in loss that does not matter (nats)."
    )
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Of the intervals; the tests' level is the rest."
    )

    published: tuple[PublishedFigure, ...] = Field(
        (), description="What the text that the study is of printed."
    )
    protocol: dict[str, Any] = Field(
        {}, description="Fields that the text had otherwise, for --as-published."
    )

    @field_validator("arms")
    @classmethod
    def _are_arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_arm(text)
        return value

    @field_validator("lr", "weight_decay", "seeds")
    @classmethod
    def _has_no_repeats(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise InputError("each may be named once")
        return value

    @model_validator(mode="after")
    def _arms_differ(self) -> Study:
        seen: dict[object, str] = {}
        for text in self.arms:
            *network, precision = parse_arm(text).network
            key = (*network, precision or self.precision)
            if key in seen:
                raise InputError(f"arms {seen[key]!r} and {text!r} are the same network")
            seen[key] = text
        return self

    @model_validator(mode="after")
    def _settings_need_validation_data(self) -> Study:
        what = "learning rates" if len(self.lr) > 1 else "weight decays"
        if len(self.settings) > 1 and not self.validation:
            raise InputError(
                f"several {what} need validation data to choose by: set validation above 0"
            )
        if len(self.settings) > 1 and len(self.seeds) == 1:
            raise InputError(
                f"several {what} need at least two seeds: an arm's is chosen by its other seeds"
            )
        return self

    @field_validator("protocol")
    @classmethod
    def _has_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in Study.model_fields:
                known = did_you_mean(name, Study.model_fields)
                raise InputError(f"protocol: unknown key {name!r}{known}")
        return value

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def settings(self) -> list[Setting]:
        """Every learning rate with every weight decay, in order of size."""
        return [Setting(*both) for both in product(sorted(self.lr), sorted(self.weight_decay))]

    @property
    def replicas(self) -> list[Replica]:
        """Every training run; arms take turns, so that an interrupted study has all of them."""
        every = product(self.seeds, self.lr, self.weight_decay, self.arms)
        return [Replica(arm, lr, seed, decay) for seed, lr, decay, arm in every]

    @property
    def fingerprint(self) -> str:
        """A digest of all that is declared, but for the words that people read.

        Of a study without probes it is what it was before there were any.
        """
        nothing = set() if self.probes else {"probes", "probe_every"}
        declared = self.model_dump(mode="json", exclude={*FOR_PEOPLE, *nothing})
        return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()

    @classmethod
    def make(cls, fields: Mapping[str, Any], source: str = "study") -> Study:
        """Make a study, or say in one line what is wrong.

        Args:
            fields: By name.
            source: Where they come from, for the message.

        Raises:
            InputError: A field is unknown or its value cannot be used.
        """
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            raise InputError(f"{source}: {_explain(error)}") from None

    def as_published(self) -> Study:
        """Return the study as the text had it: its splits, its batches, its one seed.

        Raises:
            InputError: The study is of no text, or what its `protocol` says cannot be used.
        """
        if not self.protocol:
            raise InputError(f"{self.name} is of no text: it has no protocol")
        name = f"{self.name}-as-published"
        return Study.make(
            {**self.model_dump(), **self.protocol, "name": name, "protocol": {}}, name
        )

    @classmethod
    def from_toml(cls, text: str, source: str = "study") -> Study:
        """Read a study.

        Args:
            text: TOML.
            source: Where it comes from, for messages.

        Raises:
            InputError: It is not TOML (the line is named), or not a study.
        """
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source}: not TOML: {error}") from None
        return cls.make(fields, source)

    def to_toml(self) -> str:
        """Return the study as TOML, every field written out."""
        import tomli_w

        fields = self.model_dump(mode="json", exclude_none=True)  # TOML has no null.
        own = {name: value for name, value in fields.items() if name not in Recipe.model_fields}
        return tomli_w.dumps({**own, **fields})

    def with_fields(self, fields: Mapping[str, Any], source: str = "study") -> Study:
        """Return a study in which some fields have other values.

        With another network, other data or another way of training it is no longer the one that it
        was described as, and what a text printed is not of it.

        Raises:
            InputError: As `make`.
        """
        changed = Study.make({**self.model_dump(), **fields}, source)
        if any(getattr(changed, name) != getattr(self, name) for name in _OF_THE_TEXT):
            rest = {"published": (), "protocol": {}, "description": ""}
            return changed.model_copy(update={k: v for k, v in rest.items() if k not in fields})
        return changed

    def check_against(self, splits: Splits) -> dict[str, nn.Module]:
        """Refuse what only the data can show to be impossible.

        Returns:
            The network of each arm's seed 0.

        Raises:
            InputError: A batch is larger than the training set, batch norm would get a batch of
                one sample, or a network cannot be built for these images.
        """
        size = splits.size("train")
        if self.batch_size > size:
            raise InputError(
                f"batch_size={self.batch_size} is larger than the training set ({size} images)"
            )
        alone = self.batch_size == 1 or (not self.drop_last and size % self.batch_size == 1)
        for arm in self.arms:
            if alone and parse_arm(arm).needs_batches:
                raise InputError(
                    f"arm {arm!r} would get a batch of one sample, whose variance is nothing "
                    f"({size} images in batches of {self.batch_size}): "
                    "choose another batch_size, or set drop_last"
                )
        return {arm: build_checked(self, arm, splits.dataset) for arm in self.arms}


def bundled_studies() -> dict[str, Study]:
    """Return the studies that come with the package, by name."""
    folder = resources.files(__package__) / "bundled"
    studies = [
        Study.from_toml(file.read_text("utf-8"), file.name)
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    ]
    return {study.name: study for study in studies}


def find_study(name: str) -> Study:
    """Return a bundled study by name, or read one from a TOML file.

    Args:
        name: A name of `bundled_studies()`, or a path that ends in `.toml`.

    Raises:
        InputError: There is no such study, or the file cannot be read.
    """
    if name.endswith(".toml"):
        try:
            return Study.from_toml(Path(name).read_text("utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: cannot be read: {error}") from None
    studies = bundled_studies()
    if name not in studies:
        raise InputError(
            f"unknown study {name!r}{did_you_mean(name, studies)}: bundled are "
            f"{', '.join(studies)}; a study of your own is a file whose name ends in .toml"
        )
    return studies[name]


def _explain(error: ValidationError) -> str:
    """Turn pydantic's first complaint into one line."""
    first = error.errors()[0]
    field, where, known = str((first["loc"] or ("",))[0]), "", Study.model_fields
    if field == "published" and len(first["loc"]) > 1:
        _, figure, *keys = first["loc"]
        where, known = f"published figure {int(figure) + 1}: ", PublishedFigure.model_fields
        field = str(keys[0]) if keys else ""
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {field!r}{did_you_mean(field, known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        message = message[:1].lower() + message[1:] + f", got {first['input']!r}"
    return where + (f"{field}: {message}" if field and field not in message else message)
