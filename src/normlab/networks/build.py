"""From a network's name, an arm and a seed to a network with its first values."""

from __future__ import annotations

import math

import torch
from torch import nn

from normlab.errors import InputError, did_you_mean
from normlab.layers import norm_constructor
from normlab.networks.architectures import cnn, lenet, mlp
from normlab.networks.arms import parse_arm
from normlab.networks.blocks import Slots
from normlab.networks.resnet import resnet18
from normlab.streams import stream

__all__ = ["INITS", "build_network", "check_network"]

INITS = ("torch", "xavier")
_FIXED = {"lenet": lenet, "resnet18": resnet18}
_SIZED = {"mlp": mlp, "cnn": cnn}
_SIZES = {"mlp": ("hidden sizes", "mlp:32,32"), "cnn": ("channels", "cnn:32,32,64,64")}
"""What the sizes of such a network are, and how they are written."""
_WIDEST = 65_536


def check_network(name: str) -> None:
    """Refuse a network name that `build_network` would not know.

    Raises:
        InputError: With what is known.

    >>> check_network("mlp:512,512")
    """
    _sizes(name)


def build_network(
    name: str,
    arm: str,
    seed: int,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    activation: str = "relu",
    init: str = "torch",
) -> nn.Sequential:
    """Build one replica's network.

    Each layer with weights draws its first values from a stream that belongs to the seed and to
    the layer's name, so layers that two arms share start from the same values.

    Args:
        name: `lenet`, `resnet18`, `mlp:` and the hidden sizes, or `cnn:` and the channels.
        arm: As `parse_arm` reads it.
        seed: The replica's seed.
        image_shape: (C, H, W).
        classes: Width of the output.
        activation: A key of `normlab.networks.ACTIVATIONS`.
        init: `torch` for torch's own scheme (uniform, ±1/√fan_in), or `xavier` for Glorot's
            uniform weights with torch's biases.

    Raises:
        InputError: The name, the arm or their combination is impossible.

    >>> plain, batch = (
    ...     build_network("mlp:8", arm, 0, image_shape=(1, 4, 4), classes=3)
    ...     for arm in ("plain", "batch")
    ... )
    >>> bool((plain.hidden0.linear.weight == batch.hidden0.linear.weight).all())
    True
    """
    parsed = parse_arm(arm)
    slots = Slots(
        norm=norm_constructor(parsed.norm) if parsed.norm else None,
        position=parsed.position,
        activation=activation,
        dropout=parsed.dropout,
    )
    sizes = _sizes(name)
    with torch.device("meta"):  # No values yet: torch's constructors draw from the global RNG.
        if sizes is None:
            network = _FIXED[name](image_shape, classes, slots)
        else:
            network = _SIZED[name.partition(":")[0]](image_shape, classes, sizes, slots)
    if parsed.norm and not any(part.endswith(".norm") for part, _ in network.named_modules()):
        raise InputError(
            f"arm {arm!r} finds nothing to normalize in {name}: {parsed.norm} norm needs several "
            "values per channel and sample, as a convolution has; use the arm 'layer' or 'lenet'"
        )
    network.float().to_empty(device="cpu")  # Whatever torch's default dtype is.
    for part, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _initialize(module, init, stream(seed, "init", part))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return network


def _initialize(layer: nn.Linear | nn.Conv2d, init: str, generator: torch.Generator) -> None:
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight, generator=generator)
    else:
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _sizes(name: str) -> list[int] | None:
    """Return the sizes of `mlp:…` or `cnn:…`, None for a network of fixed sizes."""
    if name in _FIXED:
        return None
    kind, colon, text = name.partition(":")
    if kind not in _SIZED:
        known = (*_FIXED, *(example for _, example in _SIZES.values()))
        raise InputError(
            f"unknown network {name!r}{did_you_mean(kind, known)}: "
            f"known are {', '.join(known)}, with any sizes"
        )
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if not colon or not all(1 <= size <= _WIDEST for size in sizes):
        what, example = _SIZES[kind]
        raise InputError(
            f"network {name!r}: {kind} wants its {what}, whole numbers from 1 to {_WIDEST}, "
            f"as in {example}"
        )
    return sizes
