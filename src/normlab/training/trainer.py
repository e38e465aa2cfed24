"""Training one network: a batch at a time, or by a recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from normlab.data import Splits, scale
from normlab.errors import InputError
from normlab.layers import draw_dropout_from
from normlab.streams import stream
from normlab.training import optimizers, program
from normlab.training.evaluation import evaluate
from normlab.training.fleet import Engine, Fleet
from normlab.training.networks import own_dropouts
from normlab.training.recipe import FleetEvent, Recipe, Replica, Setting
from normlab.training.steps import Steps

__all__ = ["Evaluation", "Trainer", "train"]

_TOLERANCE = 1e-3  # That of fleets: roundings, and nothing that does something else.

PLAIN_ENGINE = Engine("looped", "traced")


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        loss: Mean cross-entropy, in nats.
        accuracy: The share of samples whose largest logit is their label's.
    """

    loss: float
    accuracy: float


class _Prepared(NamedTuple):
    """What is found out once for batches of a shape.

    Attributes:
        run: Their pass.
        classes: Width of the output.
        dropped: Like what the dropout layers get.
    """

    run: program.Pass
    classes: int
    dropped: list[Tensor]


class Trainer:
    """Trains one network in place, by the steps that a study's fleets take.

    For each size of a batch the network's pass is recorded once, compared with what the module does
    itself, and replayed from then on, by normlab's kernels where there are some for all of it. A
    network that cannot be replayed is called anew at every step. Parameters that require no
    gradient stay as they are. `step` puts the whole network into train mode.

    Args:
        network: Returns logits, (N, classes); on any device. Its `torch.nn.Dropout` layers draw
            from a stream of `seed` from now on.
        optimizer: `adam` or `sgd`.
        lr: Learning rate.
        momentum: Of sgd.
        weight_decay: L2 penalty, added to the gradient of every parameter.
        scaling: What becomes of images that are bytes: a key of `normlab.data.SCALINGS`.
        seed: Of the dropout masks.

    Raises:
        InputError: An option cannot be used.

    >>> from normlab.data import load
    >>> from normlab.networks import build_network
    >>> mnist = load("mnist")
    >>> network = build_network("mlp:32,32", "batch", 0, image_shape=(1, 28, 28), classes=10)
    >>> trainer = Trainer(network, lr=0.01)
    >>> for x, y in zip(mnist.images.split(32)[:300], mnist.labels.split(32)):
    ...     loss = trainer.step(x, y)
    >>> trainer.evaluate(mnist.images[60_000:], mnist.labels[60_000:]).accuracy > 0.9
    True
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: str = "adam",
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        scaling: str = "0..1",
        seed: int = 0,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise InputError(f"Trainer expected a torch.nn.Module, got {type(network).__name__}")
        if not any(each.requires_grad for each in network.parameters()):
            raise InputError("the network has no parameter that requires a gradient")
        numbers = (lr, weight_decay)
        if not (all(map(math.isfinite, numbers)) and lr > 0 and weight_decay >= 0):
            raise InputError(
                f"{lr=}, {weight_decay=}: expected finite numbers, a rate above 0 and a decay not "
                "below"
            )
        try:
            recipe = Recipe(optimizer=optimizer, momentum=momentum, scaling=scaling)
        except ValidationError as error:
            (first, *_) = error.errors()
            told = first["msg"].removeprefix("Value error, ")
            field = f"{first['loc'][0]}={first['input']!r}: " if first["loc"] else ""
            raise InputError(f"{field}{told}") from None
        self.network, self.scaling = network, scaling
        own_dropouts(network)
        draw_dropout_from(stream(seed, "dropout"), network)
        # The module's own memory: it is trained in place.
        held = dict([*network.named_parameters(), *network.named_buffers()])
        trained, rest = program.state_names(network)
        self._state = [held[name].detach() for name in (*trained, *rest)]
        self._dtype = self._state[0].dtype
        stacked = [each.unsqueeze(0) for each in self._state[: len(trained)]]
        self._optimizer = optimizers.make(recipe, stacked, [Setting(lr, weight_decay)])
        # Where the module keeps what is moved here, to see that it still does.
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (place, key, value.data_ptr())
            for module in network.modules()
            for place in (module._parameters, module._buffers)
            for key, value in place.items()
            if value is not None
        ]
        self._dropouts = program.dropouts_of(network)
        self._prepared: dict[tuple[torch.Size, torch.dtype], _Prepared] = {}

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take a step on a batch, and return the loss that it had before.

        Args:
            x: Images as bytes (uint8), or any input of the network; shape (N, …).
            y: Labels, int64, shape (N,).

        Raises:
            InputError: The batch cannot be one of this network's.
        """
        if any(place[key].data_ptr() != memory for place, key, memory in self._places):
            raise InputError(
                "the network has other parameters or buffers than when the Trainer was made, as "
                "after .to() or load_state_dict(assign=True): make a new Trainer"
            )
        _check(x, y, self._state[0].device)
        self.network.train()
        x, y = self._typed(x).contiguous(), y.contiguous()
        key = (x.shape, x.dtype)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(x, y)
        run, classes, dropped = self._prepared[key]
        _check_labels(y, classes)
        layers = zip(self._dropouts, dropped, strict=True)
        fed = [
            *(dropout.draw(like) for dropout, like in layers),
            torch.arange(len(x), device=x.device),
        ]
        state = [x, y, *self._state]
        if isinstance(run, Steps):
            total, _ = run.train(state, [each.unsqueeze(0) for each in fed], self._optimizer, 0)
            return total
        loss, *gradients, _ = run([*state, *fed])
        self._optimizer.step(0, gradients)
        return float(loss)

    def _prepare(self, x: Tensor, y: Tensor) -> _Prepared:
        """Make the pass for batches like this one; a recorded one must do what the module does."""
        scaled = self._scaled(x)
        copied = copy.deepcopy(self.network)
        logits = _call(copied, scaled)
        if logits.ndim != 2 or len(logits) != len(x):
            raise InputError(
                f"of x of shape {tuple(x.shape)} the network made an output of shape "
                f"{tuple(logits.shape)}: expected ({len(x)}, classes)"
            )
        _check_labels(y, logits.shape[1])
        dropped = program.dropped(self.network, scaled)
        fed = [*map(torch.ones_like, dropped), torch.arange(len(x), device=x.device)]

        def example() -> list[Tensor]:
            return [x, y, *(each.clone() for each in self._state), *fed]

        expected = example()
        expected += program.make(copied, 1, self.scaling, expected, "eager")(expected)
        # In this order and not by timing: the same seed is to give the same bits every time.
        for code in ("native", "traced"):
            try:
                run, mine = program.make(copied, 1, self.scaling, example(), code), example()
                mine += run(mine)
                # Which logit is the largest can hang on roundings.
                if program.are_close(mine[2:-1], expected[2:-1], _TOLERANCE):
                    return _Prepared(run, logits.shape[1], dropped)
            except Exception:  # Tracing fails in many ways: then it is not for this network.
                continue
        called = program.make(self.network, 1, self.scaling, example(), "eager")
        return _Prepared(called, logits.shape[1], dropped)

    def _scaled(self, x: Tensor) -> Tensor:
        return self._typed(scale(x, self.scaling) if x.dtype == torch.uint8 else x)

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(self._dtype) if x.is_floating_point() else x

    def evaluate(self, x: Tensor, y: Tensor, batch_size: int | None = None) -> Evaluation:
        """Evaluate in eval mode; what is in a batch with a sample makes no difference to it.

        Args:
            x: As `step` takes it.
            y: The same.
            batch_size: How many at a time; by default as many as is fast.

        Raises:
            InputError: There are no samples, or not as many as labels.
        """
        _check(x, y, self._state[0].device)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected at least 1")
        modes = {each: each.training for each in self.network.modules()}
        self.network.eval()
        try:
            _check_labels(y, _call(self.network, self._scaled(x[:1])).shape[1])
            (found,) = evaluate(
                [self.network],
                self._typed(x),
                y,
                torch.arange(len(x), device=x.device),
                self.scaling,
                self._dtype,
                batch_size,
            )
        finally:
            for module, mode in modes.items():
                module.training = mode
        return Evaluation(*found)


def train(
    network: nn.Module,
    replica: Replica,
    recipe: Recipe,
    splits: Splits,
    engine: Engine = PLAIN_ENGINE,
) -> Iterator[FleetEvent]:
    """Train one network in place, yielding what is measured as it is measured, and the outcome.

    Args:
        network: With its first values; it has its last ones when the iterator ends. It is trained
            on the device that it is on. Its `torch.nn.Dropout` layers draw from the seed's stream.
            One that does something else from step to step needs the engine `eager`.
        replica: Setting and seed.
        recipe: All the rest.
        splits: Evaluated in eval mode, each of them, after every epoch and at the declared steps.
        engine: How the steps are done.
    """
    own_dropouts(network)
    device = next(network.parameters()).device
    fleet = Fleet([network], [replica], recipe, splits.to(device), engine)
    yield from fleet.train()
    trained = fleet.state(0)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            value.copy_(trained[name])
    network.train()


def _call(network: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits = network(x)
    except Exception as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"called with x of shape {tuple(x.shape)} the network raised {type(error).__name__}: "
            f"{told}"
        ) from error
    if not isinstance(logits, Tensor):
        raise InputError(f"the network returned a {type(logits).__name__}: expected logits")
    return logits


def _check(x: Tensor, y: Tensor, device: torch.device) -> None:
    for each in (x, y):
        if not isinstance(each, Tensor) or not each.ndim:
            raise InputError(f"expected two tensors with samples, got {type(each).__name__}")
    if not len(x) or y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise InputError(
            f"got x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}, {y.dtype}: expected "
            "(N, …) and (N,), int64, with N above 0"
        )
    if not x.device == y.device == device:
        raise InputError(
            f"x is on {x.device}, y on {y.device} and the network on {device}: expected one "
            "device, as by .to()"
        )


def _check_labels(y: Tensor, classes: int) -> None:
    least, most = y.aminmax()
    if not 0 <= int(least) <= int(most) < classes:
        raise InputError(f"labels reach from {least} to {most}: expected 0 to {classes - 1}")
