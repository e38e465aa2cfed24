"""Which engine trains an arm fastest: found by timing, and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from normlab.data import Splits
from normlab.errors import InputError, did_you_mean
from normlab.files import cache_folder, replace
from normlab.imports import is_function
from normlab.kernels.build import LIBRARY
from normlab.networks import parse_arm
from normlab.training.agreement import agrees_with_the_module
from normlab.training.devices import name_of
from normlab.training.fleet import Engine, Fleet
from normlab.training.recipe import Recipe, Replica
from normlab.training.steps import OPERATIONS

__all__ = ["ENGINES", "Choice", "check_engine", "choose", "stack_size"]

ENGINES = ("auto", "looped", "stacked")
_STEPS = 20
_COMPILATION = 25.0  # Seconds; what it takes differs by a factor of two between machines.


class Choice(NamedTuple):
    """The engine of an arm.

    Attributes:
        arm: Which arm.
        engine: Its engine.
        seconds: What a replica's step took with each engine that was timed, by its name.
    """

    arm: str
    engine: Engine
    seconds: dict[str, float]

    @property
    def cost(self) -> float:
        """Seconds of a replica's step; 0 if it was not timed."""
        return self.seconds.get(str(self.engine), 0.0)


def stack_size(device: torch.device) -> int:
    """Return how many replicas are in a stack; its numbers may depend on it, in their last bits.

    A CPU's caches hold a few replicas. On a GPU a step of small networks is mostly launches, of
    which many replicas need no more than few.
    """
    return 5 if device.type == "cpu" else 32


def choose(
    recipe: Recipe,
    splits: Splits,
    arm: str,
    kind: str,
    fleet: int,
    build: Callable[[Sequence[Replica], Engine], Fleet],
) -> Choice:
    """Time the engines on an arm's own steps, or recall what was found before.

    A trace that does something else than the module is not taken: it knows the operations of one
    step, and a module may do others in the next.

    Compiling takes as long as thousands of steps of a small network. It is tried where it would be
    paid back if it halved what is left to do.

    Args:
        recipe: What is trained.
        splits: On what.
        arm: Which arm.
        kind: A name of `ENGINES`; if not `auto`, only the code is chosen.
        fleet: Replicas of the arm.
        build: Makes a fleet.
    """
    device = splits.dataset.images.device
    on_cpu, stack = device.type == "cpu", min(fleet, stack_size(device))
    memory = cache_folder() / "engines" / f"{_digest(recipe, splits, arm, kind, fleet)}.json"
    try:
        recalled = json.loads(memory.read_text("utf-8"))
        choice = Choice(arm, Engine(*recalled["engine"]), recalled["seconds"])
        if not is_function(recipe.network) or _still_agrees(choice.engine, arm, stack, build):
            return choice
    except (OSError, ValueError, KeyError, TypeError):
        pass  # Nothing there, or nothing that can be read: it is timed anew.
    seconds: dict[Engine, float] = {}
    reasons: list[str] = []

    def time(engine: Engine) -> None:
        width = stack if engine.kind == "stacked" else 1
        replicas = [Replica(arm, 1e-3, seed) for seed in range(width)]
        try:
            built = build(replicas, engine)
            if engine.code == "eager" or agrees_with_the_module(built):
                seconds[engine] = built.time_step(_STEPS)
        except InputError:
            raise
        except Exception as error:  # Tracing and compiling fail in many ways: it is not for this.
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])

    if kind != "stacked":
        # In an arm that is there for torch's own layer, normlab's kernels must not stand in for it.
        if on_cpu and parse_arm(arm).norm != "torch-batch":
            time(Engine("looped", "native"))
        time(Engine("looped", "traced"))
    if kind == "stacked" or (kind == "auto" and fleet > 1):
        time(Engine("stacked", "traced"))
    if not seconds:
        if reasons and not on_cpu:
            warnings.warn(
                f"{arm}: a step cannot be recorded on {device} ({reasons[0]}), so it is trained "
                "eager, which is much slower",
                stacklevel=2,
            )
        time(Engine("looped", "eager"))
    else:
        left = (
            recipe.epochs
            * recipe.steps_per_epoch(splits.size("train"))
            * fleet
            / ((os.cpu_count() or 1) if on_cpu else 1)
        )
        if min(seconds.values()) * left / 2 > _COMPILATION:
            # A stack on a CPU gains little more where operations cost nothing to call.
            better = "looped" if on_cpu else min(seconds, key=seconds.__getitem__).kind
            time(Engine("stacked" if kind == "stacked" else better, "compiled"))
    best = min(seconds, key=seconds.__getitem__, default=Engine("looped", "eager"))
    choice = Choice(arm, best, {str(engine): took for engine, took in seconds.items()})
    with suppress(OSError):  # Where there is no room to remember, it is timed again.
        memory.parent.mkdir(parents=True, exist_ok=True)
        replace(memory, json.dumps({"engine": best, "seconds": choice.seconds}))
    return choice


def _still_agrees(
    engine: Engine, arm: str, stack: int, build: Callable[[Sequence[Replica], Engine], Fleet]
) -> bool:
    """Tell whether a user's network, whose code may be another by now, can still be trained so."""
    if engine.code == "eager":
        return True
    width = stack if engine.kind == "stacked" else 1
    try:
        return agrees_with_the_module(build([Replica(arm, 1e-3, s) for s in range(width)], engine))
    except InputError:
        raise
    except Exception:  # As where it is timed.
        return False


def check_engine(name: str) -> None:
    """Refuse a name that is no engine's.

    Raises:
        InputError: With what is known.
    """
    if name not in ENGINES:
        raise InputError(
            f"unknown engine {name!r}{did_you_mean(name, ENGINES)}: known are {', '.join(ENGINES)}"
        )


def _digest(recipe: Recipe, splits: Splits, arm: str, kind: str, fleet: int) -> str:
    # Probes make no step faster; and with another engine they would change training's last bits.
    fields = set(Recipe.model_fields) - {"probes", "probe_every"}
    kernels = LIBRARY.read_bytes() if LIBRARY.exists() else b""
    facts: list[Any] = [
        *(recipe.model_dump(mode="json", include=fields).items()),
        (tuple(splits.dataset.images.shape), splits.dataset.digest),
        (arm, kind, fleet),
        (version("normlab"), OPERATIONS, hashlib.sha256(kernels).hexdigest()),
        (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.node()),
        name_of(splits.dataset.images.device),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
