"""The network of a replica: one of normlab's own, or the user's with its norm layers exchanged."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.data.datasets import Dataset
from normlab.errors import InputError
from normlab.imports import call, is_function
from normlab.layers import Dropout
from normlab.networks import Arm, build_network, parse_arm
from normlab.probes import outputs
from normlab.streams import generators_kept, stream
from normlab.surgery import exchange_norms
from normlab.training.recipe import Recipe

__all__ = [
    "Layer",
    "build",
    "build_checked",
    "check_alike",
    "digest",
    "layers",
    "own_dropouts",
]


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

    def see(name: str, layer: nn.Module, output: Any) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        count = sum(each.numel() for each in layer.parameters())
        found.setdefault(name, Layer(name, type(layer).__name__, shape, count))

    with torch.no_grad(), outputs(network, see):
        network(torch.zeros(2, *image_shape))
    return list(found.values())


def build(recipe: Recipe, arm: str, seed: int, dataset: Dataset) -> nn.Module:
    """Return a replica's network with its first values.

    A user's constructor is called without arguments, with the global generators (torch's on the
    CPU, NumPy's, Python's) set to the seed's own stream, and left as they were afterwards; so all
    arms of a seed start from the same values. Then its norm layers are exchanged for the arm's.
    Dropout layers stay, with the arm's probability if it names one, and draw from the seed's
    stream.

    Args:
        recipe: Names the network.
        arm: As `parse_arm` reads it.
        seed: The replica's seed.
        dataset: Says what the network gets and how many classes it tells apart. The network is
            where its images are.

    Raises:
        InputError: The network cannot be built, or the arm cannot be made of it.
    """
    device = dataset.images.device
    if not is_function(recipe.network):
        return build_network(
            recipe.network,
            arm,
            seed,
            image_shape=dataset.image_shape,
            classes=dataset.classes,
            activation=recipe.activation,
            init=recipe.init,
        ).to(device)
    example = _example(dataset)
    with _seeded(stream(seed, "init").initial_seed()):
        # A copy, in case that the function returns the same network every time.
        network = copy.deepcopy(call(recipe.network))
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{recipe.network}: expected a torch.nn.Module, got {type(network).__name__}"
        )
    try:
        if not any(each.requires_grad for each in network.parameters()):
            raise InputError("it has no parameter that requires a gradient")
        _check_output(network, example, dataset.classes)
        _become(network, parse_arm(arm), example)
        if device.type != "cpu":
            _check_output(network.to(device), example.to(device), dataset.classes)
    except InputError as error:
        raise InputError(f"{recipe.network}, arm {arm!r}: {error}") from None
    return network


def build_checked(recipe: Recipe, arm: str, dataset: Dataset) -> nn.Module:
    """Return the network of an arm's seed 0, if all that a study needs of it is so.

    Raises:
        InputError: As `build`; or a user's network has random numbers or a state that a study
            cannot hold.
    """
    network = build(recipe, arm, 0, dataset)
    if is_function(recipe.network):
        try:
            _check_that_it_repeats(network, _example(dataset))
            _check_that_its_state_is_all(network, _example(dataset))
        except InputError as error:
            raise InputError(f"{recipe.network}, arm {arm!r}: {error}") from None
    return network


def check_alike(recipe: Recipe, networks: Sequence[nn.Module], dataset: Dataset) -> None:
    """Refuse networks of a user's that differ in more than their parameters and buffers.

    A fleet runs all of its replicas through the first one's module.

    Raises:
        InputError: They do.
    """
    example = _example(dataset).to(dataset.images.device)
    first = copy.deepcopy(networks[0]).eval()
    with torch.no_grad():
        for network in networks[1:]:
            state = dict([*network.named_parameters(), *network.named_buffers()])
            itself = copy.deepcopy(network).eval()
            if not functional_call(first, state, example).equal(itself(example)):
                raise InputError(
                    f"{recipe.network}: its networks differ from seed to seed in something that is "
                    "neither a parameter nor a buffer: make it a buffer (register_buffer)"
                )


def _example(dataset: Dataset) -> Tensor:
    return torch.rand(2, *dataset.image_shape, generator=stream(0, "example"))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the global generators of torch on the CPU, NumPy and Python, and put them back.

    NumPy's legacy one, too: it is that which a constructor draws from without naming one.
    """
    with generators_kept():
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield


def _check_output(network: nn.Module, example: Tensor, classes: int) -> None:
    shape = tuple(example.shape)
    network.eval()
    try:
        with torch.no_grad():
            output = network(example)
    except Exception as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"called with images of shape {shape} it raised {type(error).__name__}: {told}"
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
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def own_dropouts(network: nn.Module) -> None:
    """Let a network's `torch.nn.Dropout` layers be normlab's, which draw from a given generator."""
    for each in network.modules():
        if type(each) is nn.Dropout:
            each.__class__ = Dropout


def _check_that_it_repeats(network: nn.Module, example: Tensor) -> None:
    """Refuse a network that has random numbers of its own, or that changes from call to call."""
    network = _without_dropout(network)
    with torch.no_grad():
        first, second = network(example), network(example)
    if not first.equal(second):
        raise InputError(
            "called twice it returned different outputs: expected no randomness but that of "
            "torch.nn.Dropout layers, whose random numbers belong to the seed"
        )


def _check_that_its_state_is_all(network: nn.Module, example: Tensor) -> None:
    """Refuse a network that keeps what it learns elsewhere than in parameters and buffers."""
    called, other = _without_dropout(network), _without_dropout(network)
    state = {name: each.detach().clone() for name, each in other.named_parameters()}
    state |= {name: each.clone() for name, each in other.named_buffers()}
    with torch.no_grad():
        called(example)
        given = dict(state)
        functional_call(other, state, example)  # Puts into the dict what was assigned.
        for name, buffer in given.items():
            if state[name] is not buffer:
                raise InputError(
                    f"it assigns a new tensor to its buffer {name!r}: expected one that is changed "
                    "in place (copy_, mul_, lerp_), as the steps of a study need it"
                )
        fresh = _without_dropout(network).eval()
        if not functional_call(fresh, state, example).equal(called.eval()(example)):
            raise InputError(
                "it keeps something from call to call that is neither a parameter nor a buffer, "
                "and would be mixed among seeds: make it a buffer (register_buffer)"
            )


def _without_dropout(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network).train()
    for each in copied.modules():
        if isinstance(each, Dropout):
            each.p = 0.0
    return copied
