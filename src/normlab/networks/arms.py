"""Arms: the variants of a network under comparison, written in a small grammar.

arm     = "plain" | part { "+" part }         at most one of each kind
part    = norm [ "@" position ] | "dropout:" probability | "bfloat16"
norm    = "batch" | "torch-batch" | "layer" | "group:" groups | "instance" | "rms"
position = "pre" | "post" | "input"           before (the default) or after the activation,
                                              or on the input of the layer
"""

from __future__ import annotations

from dataclasses import dataclass

from normlab.errors import InputError, did_you_mean
from normlab.layers import norm_constructor, norm_names

__all__ = ["POSITIONS", "Arm", "parse_arm"]

POSITIONS = ("pre", "post", "input")


@dataclass(frozen=True)
class Arm:
    """One variant of a network.

    Attributes:
        text: The arm as it was written, which is also how it prints.
        norm: A name for `normlab.layers.norm_constructor`, or None.
        position: Where the norm stands: `pre` or `post` the activation, or on the layer's `input`.
        dropout: The probability with which a hidden activation is dropped.
        precision: Of the matrix products in training, if the arm says it.
    """

    text: str
    norm: str | None = None
    position: str = "pre"
    dropout: float = 0.0
    precision: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def network(self) -> tuple[str | None, str, float, str | None]:
        """What the arm does to a network; two arms that agree in it are the same network."""
        return self.norm, self.position, self.dropout, self.precision

    @property
    def needs_batches(self) -> bool:
        """Whether training needs at least two samples in every batch."""
        return self.norm in ("batch", "torch-batch")


def parse_arm(text: str) -> Arm:
    """Read an arm.

    Raises:
        InputError: The text is not an arm; the message lists what is known.

    >>> parse_arm("batch@post+dropout:0.5")
    Arm(text='batch@post+dropout:0.5', norm='batch', position='post', dropout=0.5, precision=None)
    >>> str(parse_arm("group:8"))
    'group:8'
    """
    if text == "plain":
        return Arm(text)
    norm: str | None = None
    position, dropout, precision = "pre", 0.0, None
    for part in text.split("+"):
        kind, _, argument = part.partition(":")
        if kind == "dropout":
            if dropout:
                raise InputError(f"arm {text!r} has two dropouts: one is allowed")
            dropout = _probability(text, argument)
            continue
        if part == "bfloat16":
            if precision:
                raise InputError(f"arm {text!r} says bfloat16 twice: once is enough")
            precision = part
            continue
        if part == "plain":
            raise InputError(f"arm {text!r}: plain stands alone; leave it out, as in dropout:0.5")
        name, at, where = part.partition("@")
        if name.partition(":")[0] not in {known.partition(":")[0] for known in norm_names()}:
            known = ["plain", *norm_names(), "dropout:0.5", "bfloat16"]
            raise InputError(
                f"unknown arm {text!r}{did_you_mean(name, known)}: known are "
                f"{', '.join(known)}, parts joined with +, "
                f"and a norm's position {', '.join('@' + p for p in POSITIONS)}"
            )
        if norm is not None:
            raise InputError(f"arm {text!r} has two norms: one is allowed")
        norm_constructor(name)
        if at and where not in POSITIONS:
            raise InputError(
                f"arm {text!r}: unknown position {where!r}, known are {', '.join(POSITIONS)}"
            )
        norm, position = name, where or "pre"
    return Arm(text, norm, position, dropout, precision)


def _probability(text: str, argument: str) -> float:
    try:
        probability = float(argument)
    except ValueError:
        probability = -1.0
    if not 0 < probability < 1:
        raise InputError(
            f"arm {text!r}: dropout wants a probability between 0 and 1, as in dropout:0.5"
        )
    return probability
