"""The network of a replica: one of normlab's own, or the user's with its norm layers exchanged."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.data.datasets import Dataset
from normlab.errors import InputError
from normlab.imports import call, is_function
from normlab.layers import Dropout
from normlab.networks import Arm, build_network, parse_arm
from normlab.streams import stream
from normlab.surgery import exchange_norms
from normlab.training.recipe import Recipe

__all__ = ["Layer", "build", "digest", "layers", "own_dropouts"]


class Layer(NamedTuple):
    """A layer of a network: a module without modules of its own.

    Attributes:
        name: Its qualified name.
        kind: Its class.
        shape: Of what it makes of one sample.
        parameters: How many numbers it learns.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


def layers(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """Return a network's layers in the order in which they are first called.

    >>> from normlab.networks import build_network
    >>> network = build_network("mlp:8", "batch", 0, image_shape=(1, 4, 4), classes=3)
    >>> layers(network, (1, 4, 4))[2]
    Layer(name='hidden0.norm', kind='BatchNorm1d', shape=(8,), parameters=16)
    """
    network, found = copy.deepcopy(network).eval(), dict[str, Layer]()

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, _: Any, output: Any) -> None:
            shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
            count = sum(each.numel() for each in module.parameters())
            found.setdefault(name, Layer(name, type(module).__name__, shape, count))

        return see

    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        network(torch.zeros(1, *image_shape))
    return list(found.values())


def build(recipe: Recipe, arm: str, seed: int, dataset: Dataset) -> nn.Module:
    """Return a replica's network with its first values.

    A user's constructor is called without arguments, with torch's global generator set to the
    seed's own stream, and left as it was afterwards; so all arms of a seed start from the same
    values. Then its norm layers are exchanged for the arm's. Dropout layers stay, with the arm's
    probability if it names one, and draw from the seed's stream.

    Args:
        recipe: Names the network.
        arm: As `parse_arm` reads it.
        seed: The replica's seed.
        dataset: Says what the network gets and how many classes it tells apart.

    Raises:
        InputError: The network cannot be built, or the arm cannot be made of it.
    """
    if not is_function(recipe.network):
        return build_network(
            recipe.network,
            arm,
            seed,
            image_shape=dataset.image_shape,
            classes=dataset.classes,
            activation=recipe.activation,
            init=recipe.init,
        )
    example = torch.rand(2, *dataset.image_shape, generator=stream(0, "example"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "init").initial_seed())
        network = call(recipe.network)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"{recipe.network}: expected a torch.nn.Module, got {type(network).__name__}"
            )
        try:
            _check_output(network, example, dataset.classes)
            _become(network, parse_arm(arm), example)
            _check_that_it_repeats(network, example)
        except InputError as error:
            raise InputError(f"{recipe.network}, arm {arm!r}: {error}") from None
    return network


def _check_output(network: nn.Module, example: Tensor, classes: int) -> None:
    shape = tuple(example.shape)
    network.eval()
    try:
        with torch.no_grad():
            output = network(example)
    except Exception as error:
        raise InputError(
            f"called with images of shape {shape} it raised {type(error).__name__}: {error}"
        ) from error
    network.train()
    if not isinstance(output, Tensor):
        raise InputError(f"it returned a {type(output).__name__}: expected a tensor of logits")
    if output.ndim != 2 or len(output) != len(example) or output.shape[1] < classes:
        raise InputError(
            f"of images of shape {shape} it made an output of shape {tuple(output.shape)}: "
            f"expected ({len(example)}, {classes}), a logit for each class"
        )


def _become(network: nn.Module, arm: Arm, example: Tensor) -> None:
    """Make a user's network the arm's variant of it."""
    if arm.position != "pre":
        raise InputError("a network of your own has its norms where it has them: leave out @")
    exchange_norms(network, arm.norm, example)
    own_dropouts(network)
    dropouts = [each for each in network.modules() if isinstance(each, Dropout)]
    if arm.dropout and not dropouts:
        raise InputError("it has no torch.nn.Dropout whose probability could be set")
    for dropout in dropouts:
        dropout.p = arm.dropout or dropout.p


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's layers and values, which show of its code what they can."""
    found = hashlib.sha256(repr(network).encode())
    for name, value in network.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def own_dropouts(network: nn.Module) -> None:
    """Let a network's `torch.nn.Dropout` layers be normlab's, which draw from a given generator."""
    for each in network.modules():
        if type(each) is nn.Dropout:
            each.__class__ = Dropout


def _check_that_it_repeats(network: nn.Module, example: Tensor) -> None:
    """Refuse a network that has random numbers of its own, or that changes from call to call."""
    network = copy.deepcopy(network).train()
    for each in network.modules():
        if isinstance(each, Dropout):
            each.p = 0.0
    with torch.no_grad():
        first, second = network(example), network(example)
    if not first.equal(second):
        raise InputError(
            "called twice it returned different outputs: expected no randomness but that of "
            "torch.nn.Dropout layers, whose random numbers belong to the seed"
        )
