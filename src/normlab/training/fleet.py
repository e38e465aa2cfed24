"""A fleet: replicas of one arm, trained side by side by one program.

Every replica keeps its own first values, learning rate, order of the data and dropout masks. None
of its numbers depends on the replicas beside it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.data import Splits, gather
from normlab.errors import InputError
from normlab.layers import draw_dropout_from
from normlab.probes import Histogram, inside, read
from normlab.streams import stream
from normlab.training import checkpoint, optimizers, program
from normlab.training.evaluation import evaluate
from normlab.training.graphs import GRAPHS, Recorded
from normlab.training.inside import PROBED, SHOWN, learned, spread
from normlab.training.layout import channels_last, laid_out, may_have_channels_last
from normlab.training.recipe import FleetEvent, Measurement, Outcome, Reading, Recipe, Replica
from normlab.training.schedule import Schedule
from normlab.training.steps import Steps

__all__ = ["Engine", "Fleet"]

_SPAN = 50  # Steps in one call, in which nothing can interrupt it.
_MASKS = 2**26  # Bytes of dropout masks that are drawn ahead.
_Batch = tuple[program.Pass, int, int]
"""A batch's pass, and where in the shuffled epoch it starts and ends."""


class Engine(NamedTuple):
    """How the steps of a fleet are done.

    Attributes:
        kind: `looped`, one replica after another, or `stacked`, all in one operation.
        code: `native` by normlab's kernels, `compiled` to machine code, `traced` and replayed, or
            `eager`, the module itself.
    """

    kind: Literal["looped", "stacked"]
    code: Literal["native", "compiled", "traced", "eager"]

    def __str__(self) -> str:
        return f"{self.kind}, {self.code}"


class Fleet:
    """The state of a fleet, and its next steps.

    Args:
        networks: One for each replica, of the same build, with their first values. Their values
            are left alone; the first serves to run the fleet, and changes its mode.
        replicas: Which they are.
        recipe: What they have in common.
        splits: What they are trained and evaluated on; where the networks are. On a device with
            graphs (CUDA's) every step is replayed as one.
        engine: How.
        passes: Those made for other fleets of this recipe, by what they depend on; added to.
        precision: Of matrix products and convolutions; the recipe's unless given.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        replicas: Sequence[Replica],
        recipe: Recipe,
        splits: Splits,
        engine: Engine,
        passes: dict[Any, program.Pass] | None = None,
        precision: str | None = None,
    ) -> None:
        # An eager pass calls the module itself, which another fleet may have left in eval mode.
        self._passes = {} if passes is None or engine.code == "eager" else passes
        self.replicas, self.recipe, self.splits, self.engine = replicas, recipe, splits, engine
        self.precision = precision or recipe.precision
        self.step, self.seconds = 0, 0.0
        self.events: list[FleetEvent] = []
        self.network = networks[0]
        self._names, self._buffer_names = program.state_names(self.network)
        named = [dict([*each.named_parameters(), *each.named_buffers()]) for each in networks]
        self._parameters, self._buffers = (
            [torch.stack([state[name].detach() for state in named]) for name in names]
            for names in (self._names, self._buffer_names)
        )
        self.device = splits.dataset.images.device
        if (other := self._parameters[0].device) != self.device:
            raise InputError(
                f"the networks are on {other} and the images on {self.device}: expected one "
                "device, as by Splits.to()"
            )
        self._orders = [stream(each.seed, "order") for each in replicas]
        self._dropouts = []
        for network, replica in zip(networks, replicas, strict=True):
            draw_dropout_from(stream(replica.seed, "dropout"), network)
            self._dropouts.append(program.dropouts_of(network))
        # Sums of the batches' losses, smaller ones by their share, and of hits; and what they were
        # when the epoch began. Added up step by step: wherever training stops, they are the same.
        self.losses = torch.zeros(len(replicas), dtype=torch.float64, device=self.device)
        self.hits = torch.zeros_like(self.losses)
        self._begun = self.losses.clone(), self.hits.clone()
        self._build()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.recipe.steps_per_epoch(self.splits.size("train"))

    @property
    def alive(self) -> list[int]:
        """Which replicas are still trained: those without an outcome."""
        ended = {event.replica for event in self.events if isinstance(event, Outcome)}
        return [r for r, replica in enumerate(self.replicas) if replica not in ended]

    def state(self, replica: int) -> dict[str, Tensor]:
        """Return a replica's parameters and buffers, by their names in the network."""
        values = [*self._parameters, *self._buffers]
        names = [*self._names, *self._buffer_names]
        return {name: value[replica] for name, value in zip(names, values, strict=True)}

    def train(self, path: Path | None = None) -> Iterator[FleetEvent]:
        """Train to the end, yielding measurements, what probes read, and outcomes.

        Args:
            path: Where the state is kept after every epoch. If it is there already, training
                goes on from it, and what was measured before is yielded again.

        Raises:
            NormlabError: The checkpoint is not one of this fleet, or cannot be written.
        """
        if path is not None and path.exists():
            self._load(path)
            yield from self.events
        schedule = Schedule.of(self.recipe, self.steps_per_epoch)
        last = self.recipe.epochs * self.steps_per_epoch
        while self.step < last and self.alive:
            started, known = time.perf_counter(), len(self.events)
            if not self.step and schedule.probes(0):
                self._read()
            self.advance(schedule.next(self.step))
            if schedule.evaluates(self.step):
                self._look()
            if schedule.probes(self.step):
                self._read()
            self.seconds += time.perf_counter() - started
            yield from self.events[known:]
            if path is not None and self.step % self.steps_per_epoch == 0 and self.step < last:
                self._save(path)
        share, known = self.seconds / len(self.replicas), len(self.events)
        for r in self.alive:
            norms = learned(self.network, self.state(r))
            self.events.append(Outcome(self.replicas[r], "done", self.step, share, norms))
        yield from self.events[known:]

    def time_step(self, steps: int, rounds: int = 3) -> float:
        """Return the seconds that a replica's step takes: in the best of some rounds of steps.

        The fleet is moved by it, and of no other use afterwards.
        """
        self.advance(self.step + 1)
        self.losses.tolist()
        best = math.inf
        for _ in range(rounds):
            started = time.perf_counter()
            self.advance(self.step + steps)
            self.losses.tolist()  # Which waits until a device is through.
            best = min(best, time.perf_counter() - started)
        return best / (steps * len(self.replicas))

    # ------------------------------------------------------------------------ steps

    def _build(self) -> None:
        """Make the pass, and lay parameters out as their gradients are, for one sweep over both."""
        self.network.train()
        images, labels = self.splits.dataset.images, self.splits.dataset.labels
        is_torchs = not self._is_stacked and self.engine.code != "native"
        if is_torchs and self.device.type == "cpu" and may_have_channels_last(self.network):
            self._parameters = [channels_last(p) if p.ndim == 5 else p for p in self._parameters]
        example = self.example(self.recipe.batch_size)
        strides = program.gradient_strides(
            copy.deepcopy(self.network),
            self._width,
            self.recipe.scaling,
            [each.clone() for each in example],
        )
        self._parameters = [
            p if p.ndim == 5 and not self._is_stacked else laid_out(p, of[self._is_stacked :])
            for p, of in zip(self._parameters, strides, strict=True)
        ]
        # Masks are drawn on the CPU: a seed has the same ones everywhere.
        self._masked = [
            mask.cpu() for mask in self._dropped(example[-1].flatten()[: self.recipe.batch_size])
        ]
        self._optimizer = optimizers.make(
            self.recipe, self._parameters, [replica.setting for replica in self.replicas]
        )
        self._state = [*self._parameters, *self._buffers]
        self._inputs = [
            [images, labels, *(each[r] for each in self._state)] for r in range(len(self.replicas))
        ]
        self._sums = list(zip(self.losses.unbind(), self.hits.unbind(), strict=True))
        if self._is_stacked:
            self._inputs = [[images, labels, *self._state]]
            self._sums = [(self.losses, self.hits)]
        kinds = tuple((each.dtype, each.shape[1:]) for each in self._state)
        # What a pass depends on; put together once, for it is asked for at every step.
        self._kind = (self.replicas[0].arm, kinds, self.precision, self.engine, self._width)
        self._graphs: dict[tuple[int | None, int], Recorded] = {}
        # Of one that has diverged nobody draws another order, and a stack still reads it.
        self._shuffled = self.splits.indices["train"].repeat(len(self.replicas), 1)

    @property
    def _is_stacked(self) -> bool:
        return self._width > 1

    @property
    def _width(self) -> int:
        return len(self.replicas) if self.engine.kind == "stacked" else 1

    def example(self, batch_size: int) -> list[Tensor]:
        """Return tensors like those that a pass takes."""
        images, labels = self.splits.dataset.images, self.splits.dataset.labels
        batch = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        state = [*self._parameters, *self._buffers]
        masks = [torch.ones_like(mask) for mask in self._dropped(batch)]
        if not self._is_stacked:
            return [images, labels, *(each[0] for each in state), *masks, batch]
        return [
            images,
            labels,
            *state,
            *(torch.stack([each] * self._width) for each in (*masks, batch)),
        ]

    def _dropped(self, batch: Tensor) -> list[Tensor]:
        return program.dropped(self.network, self._images(batch))

    def _images(self, indices: Tensor) -> Tensor:
        """Return images as the network gets them."""
        x = gather(self.splits.dataset.images, indices, self.recipe.scaling)
        return x.to(self._parameters[0].dtype)

    def pass_for(self, batch_size: int) -> program.Pass:
        """Return the pass for batches of a size; only the usual one is worth more than a trace."""
        key = (*self._kind, batch_size)
        if key not in self._passes:
            rare = batch_size != self.recipe.batch_size and self.engine.code != "eager"
            code = "traced" if rare else self.engine.code
            self._passes[key] = self.make_pass(batch_size, code, self.precision)
        return self._passes[key]

    def make_pass(self, batch_size: int, code: str, precision: str) -> program.Pass:
        """Make a pass for batches of a size; `code` and `precision` as `program.make` has them."""
        example = self.example(batch_size)
        scaling = self.recipe.scaling
        return program.make(self.network, self._width, scaling, example, code, precision)

    def advance(self, stop: int) -> None:
        """Take steps up to this one."""
        self.network.train()
        while self.step < stop:
            into_epoch = self.step % self.steps_per_epoch
            if not into_epoch:
                self._begun = self.losses.clone(), self.hits.clone()
                train = self.splits.indices["train"]
                for r in self.alive:
                    order = torch.randperm(len(train), generator=self._orders[r])
                    self._shuffled[r] = train[order.to(self.device)]
            until = min(stop, self.step - into_epoch + self.steps_per_epoch)
            if self._is_stacked:
                self._advance_all(until)
            else:
                # One after another: a replica's state stays in the cache for all of its steps.
                for r in self.alive:
                    self._advance_one(r, until)
            self.step = until

    def _advance_one(self, r: int, stop: int) -> None:
        for run, batches in groupby(self._batches(stop), itemgetter(0)):
            if isinstance(run, Steps):
                self._take_natively(r, run, batches)
            else:
                for _, start, end in batches:
                    masks = self._masks(r, end - start)
                    self._take(run, [*masks, self._shuffled[r, start:end]], r)

    def _take_natively(self, r: int, run: Steps, batches: Iterable[_Batch]) -> None:
        masked = sum(like.nbytes for like in self._masked)
        most = max(1, min(_SPAN, _MASKS // max(masked, 1)))
        batches = iter(batches)
        while span := list(islice(batches, most)):
            (_, start, end), last = span[0], span[-1][2]
            masks = [self._masks(r, end - start) for _ in span]
            fed = [torch.stack(each) for each in zip(*masks, strict=True)]
            fed.append(self._shuffled[r, start:last].view(len(span), -1))
            share = (end - start) / self.recipe.batch_size
            so_far = float(self.losses[r]) / share
            losses, hits = run.train(self._inputs[r], fed, self._optimizer, r, so_far)
            self.losses[r] = losses * share
            self.hits[r] += hits

    def _advance_all(self, stop: int) -> None:
        for run, start, end in self._batches(stop):
            batch = self._shuffled[:, start:end].contiguous()
            masks = [self._masks(r, end - start) for r in range(len(self.replicas))]
            stacked = [torch.stack(each) for each in zip(*masks, strict=True)]
            self._take(run, [*stacked, batch])

    def _take(self, run: program.Pass, fed: Sequence[Tensor], r: int | None = None) -> None:
        """Take a step with a replica, or with the stack, given masks and indices."""
        if self.engine.code == "eager" or self.device.type not in GRAPHS:
            self._step(run, r, [each.to(self.device) for each in fed])
            return
        key = (r, fed[-1].shape[-1])
        if key not in self._graphs:
            moved = [*self._state, *self._optimizer.state, self.losses, self.hits]
            self._graphs[key] = Recorded(partial(self._step, run, r), fed, moved)
        self._graphs[key](fed)

    def _step(self, run: program.Pass, r: int | None, fed: Sequence[Tensor]) -> None:
        """Do the operations of a step, none of which looks at a number."""
        loss, *gradients, hits = run([*self._inputs[r or 0], *fed])
        if r is None:
            self._optimizer.step_all(gradients)
        else:
            self._optimizer.step(r, gradients)
        total, right = self._sums[r or 0]
        total.add_(loss.double() * (fed[-1].shape[-1] / self.recipe.batch_size))
        right.add_(hits)

    def _masks(self, r: int, size: int) -> list[Tensor]:
        """Draw a replica's dropout masks for a batch."""
        layers = zip(self._dropouts[r], self._masked, strict=True)
        return [dropout.draw(like[:size]) for dropout, like in layers]

    def _batches(self, stop: int) -> Iterator[_Batch]:
        """Yield the pass and the place of each batch in the shuffled epoch."""
        size, total = self.recipe.batch_size, self.splits.size("train")
        for step in range(self.step, stop):
            start = step % self.steps_per_epoch * size
            end = min(start + size, total)
            yield self.pass_for(end - start), start, end

    # ------------------------------------------------------------------- evaluation

    def _look(self) -> None:
        """Evaluate on every split; a replica without finite numbers has diverged.

        Of the epoch's batches so far it is told, too, what they were like when they were trained
        on, which is what tutorials print.
        """
        finite = self.losses.isfinite().tolist()
        looked_at = [r for r in self.alive if finite[r]]
        samples = self._samples_of_epoch()
        batches = samples / self.recipe.batch_size
        losses, hits = (
            (self.losses - self._begun[0]).tolist(),
            (self.hits - self._begun[1]).tolist(),
        )
        values: dict[int, dict[tuple[str, str], float]] = {
            r: {
                ("batches", "loss"): losses[r] / batches,
                ("batches", "accuracy"): hits[r] / samples,
            }
            for r in looked_at
        }
        for split, indices in self.splits.indices.items():
            found = self.evaluate(looked_at, indices)
            for r, (loss, accuracy) in zip(looked_at, found, strict=True):
                values[r] |= {(split, "loss"): loss, (split, "accuracy"): accuracy}
        epoch, into_epoch = divmod(self.step, self.steps_per_epoch)
        inner = {} if into_epoch else self._histograms(looked_at)
        for r in self.alive:
            replica, seen = self.replicas[r], values.get(r, {})
            if seen and all(map(math.isfinite, seen.values())):
                self.events.append(Measurement(replica, self.step, epoch, seen, inner.get(r, {})))
            else:
                share = self.seconds / len(self.replicas)
                self.events.append(Outcome(replica, "diverged", self.step, share))

    def _histograms(self, replicas: Sequence[int]) -> dict[int, dict[str, dict[str, Histogram]]]:
        """Return how the values inside replicas are distributed, in the mode of the moment."""
        x = self._images(spread(self.splits.indices["train"], SHOWN))
        return {r: inside(self.network, self.state(r), x) for r in replicas}

    def _read(self) -> None:
        """Let the probes measure the replicas that are trained."""
        indices = spread(self.splits.indices["train"], PROBED)
        x, y = self._images(indices), self.splits.dataset.labels[indices]
        for r in self.alive:
            replica = self.replicas[r]
            values = read(self.recipe.probes, self.network, self.state(r), x, y, replica.lr)
            epoch = self.step // self.steps_per_epoch
            self.events.append(Reading(replica, self.step, epoch, values))

    def _samples_of_epoch(self) -> int:
        """Return how many samples of the epoch, running or just ended, were trained on."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        return min(steps * self.recipe.batch_size, self.splits.size("train"))

    def evaluate(self, replicas: Sequence[int], indices: Tensor) -> list[tuple[float, float]]:
        """Return the mean cross-entropy and the accuracy of replicas, in eval mode.

        Args:
            replicas: Which of the fleet's.
            indices: Of images, int64.
        """
        self.network.eval()
        states = [self.state(r) for r in replicas]
        networks = [partial(functional_call, self.network, state) for state in states]
        dataset, dtype = self.splits.dataset, self._parameters[0].dtype
        return evaluate(
            networks, dataset.images, dataset.labels, indices, self.recipe.scaling, dtype
        )

    # ------------------------------------------------------------------ checkpoints

    def _save(self, path: Path) -> None:
        facts = {"step": self.step, "seconds": self.seconds, "engine": str(self.engine)}
        checkpoint.save(path, self._kept(), facts, self.events)

    def _load(self, path: Path) -> None:
        kept = self._kept()
        facts, self.events = checkpoint.load(path, kept, engine=str(self.engine))
        self.step, self.seconds = facts["step"], facts["seconds"]
        for r in range(len(self.replicas)):
            self._orders[r].set_state(kept[f"order.{r}"])
            for dropout in self._dropouts[r][:1]:  # All of a replica draw from one generator.
                if dropout.generator is not None:
                    dropout.generator.set_state(kept[f"dropout.{r}"])

    def _kept(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, by name."""
        kept = {f"state.{i}": each for i, each in enumerate(self._state)}
        kept |= {f"optimizer.{i}": each for i, each in enumerate(self._optimizer.state)}
        for r, order in enumerate(self._orders):
            kept[f"order.{r}"] = order.get_state()
            for dropout in self._dropouts[r][:1]:
                if dropout.generator is not None:
                    kept[f"dropout.{r}"] = dropout.generator.get_state()
        return {**kept, "losses": self.losses, "hits": self.hits}
