"""`normlab bench fleet`: what a training run costs, against the loops that people write.

Every peer trains the same network from the same first values on the same batches, with torch's own
layers. A call makes a span of steps in the middle of an epoch; the peers take turns at calls, and
what a call takes is scaled to seconds per replica and epoch. Each piece of work is measured in a
process of its own, whose C library keeps freed memory. The tutorials' loop gains from that where
its blocks are large (LeNet's are); it also gains the four batches of its `2 * STEPS` that its
loader has ready when its turn comes. Both make it look faster than it is where it was written.

Measure on a machine that does nothing else. torch's threads wait for each other by spinning: with
one of two cores taken, small steps were seen to take a hundred times as long.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from normlab.bench.timing import Timing, machine, take_turns, versions
from normlab.data import SCALINGS, load, scale
from normlab.networks import build_network
from normlab.processes import Workers
from normlab.streams import stream

__all__ = ["WORKS", "FleetBenchmark", "Peer", "Row", "Work", "bench_fleet", "peers"]

STEPS = 50
REPLICAS = 10
_NEEDED = {"tutorial": ("pillow", "PIL"), "jax": ("jax", "jax")}
"""What peers need that normlab does not: a package, and its module."""
_EPOCHS = 1000  # More than are ever measured, so that the tutorials' loader starts once.

Peer = tuple[Callable[[], object], float]
"""What to call, and how many steps it makes, those of all replicas counted. A call returns the mean
loss of its steps as a float, or anything else if it has none. Its `close`, if it has one, is called
at the end."""


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        name: As it is printed.
        network: `mlp:` and the hidden sizes, or `lenet`.
        batch_size: Samples a step; an epoch's last, smaller batch is left out.
        optimizer: `adam` or `sgd`.
        lr: Learning rate.
        activation: Of the hidden layers.
        arm: The norm; `batch` is `torch.nn`'s for the peers here.
        init: As `build_network` takes it.
        dataset: A name for `normlab.data.load`, or `random` for random bytes and labels.
        image_shape: (C, H, W).
        images: How many an epoch has: of a data set its first ones.
        scaling: A key of `normlab.data.SCALINGS`.
        loader_workers: Processes of the tutorials' DataLoader.
    """

    name: str
    network: str
    batch_size: int
    optimizer: str
    lr: float
    activation: str = "relu"
    arm: str = "batch"
    init: str = "torch"
    dataset: str = "mnist"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    images: int = 60_000
    scaling: str = "0..1"
    loader_workers: int = 2

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self.images // self.batch_size

    def load(self) -> tuple[Tensor, Tensor]:
        """Return images (uint8, (N, C, H, W)) and labels (int64, (N,))."""
        if self.dataset == "random":
            generator = stream(0, "random images")
            shape = (self.images, *self.image_shape)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            return images, torch.randint(10, (self.images,), generator=generator)
        dataset = load(self.dataset)
        return dataset.images[: self.images], dataset.labels[: self.images]

    def build(self, seed: int) -> nn.Sequential:
        """Return the network of a seed, with torch's batch norm."""
        arm = {"batch": "torch-batch"}.get(self.arm, self.arm)
        return build_network(
            self.network,
            arm,
            seed,
            image_shape=self.image_shape,
            classes=10,
            activation=self.activation,
            init=self.init,
        )

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield the indices of a seed's batches, epoch after epoch."""
        generator = stream(seed, "order")
        while True:
            order = torch.randperm(self.images, generator=generator)
            yield from order.split(self.batch_size)[: self.steps_per_epoch]


WORKS = (
    Work("mlp 784-32-32-10, batch 32, Adam", "mlp:32,32", 32, "adam", 0.01),
    Work("mlp 784-512-512-10, batch 64, SGD", "mlp:512,512", 64, "sgd", 0.1),
    # CIFAR-10 does not come with the package; what its bytes say makes no difference to the time.
    Work(
        "mlp 3072-128-10, batch 32, Adam",
        "mlp:128",
        32,
        "adam",
        1e-4,
        dataset="random",
        image_shape=(3, 32, 32),
        images=50_000,
        scaling="-1..1",
    ),
    Work("LeNet, batch 256, SGD", "lenet", 256, "sgd", 0.9, activation="sigmoid", init="xavier"),
)


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
        work: What was trained.
        timings: Seconds per replica and epoch, by peer.
        losses: Mean loss of a peer's first call and of its last: it did train.
        startup: Seconds in which the tutorials' loader starts and ends its processes; they are
            in its timing, once an epoch.
        skipped: Peers that were not measured, and why.
    """

    work: Work
    timings: dict[str, Timing]
    losses: dict[str, tuple[float, float]]
    startup: float
    skipped: dict[str, str]

    def against(self, peer: str) -> dict[str, float]:
        """Return how many times faster than others a peer is; not a number for one not measured.

        The ceiling is the faster of the two ways to make the matrix products alone.
        """
        medians = {name: timing.median for name, timing in self.timings.items()}
        ceiling = min(median for name, median in medians.items() if name.startswith("products"))
        return {
            "against tutorial": medians.get("tutorial", math.nan) / medians[peer],
            "against eager": medians["eager"] / medians[peer],
            "against jax": medians.get("jax", math.nan) / medians[peer],
            "share of the ceiling": ceiling / medians[peer],
        }


@dataclass(frozen=True)
class FleetBenchmark:
    """All that was measured.

    Attributes:
        rows: Of each piece of work.
        versions: Of normlab, torch and Python, and of what only peers need.
        machine: Its processor, vector instructions and threads.
    """

    rows: list[Row]
    versions: dict[str, str]
    machine: str

    def frame(self) -> pd.DataFrame:
        """Return a row for each work and peer: seconds with quartiles, and ratios."""
        return pd.DataFrame(
            [
                {
                    "work": row.work.name,
                    "peer": peer,
                    "seconds": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    **row.against(peer),
                }
                for row in self.rows
                for peer, timing in row.timings.items()
            ]
        )

    def __str__(self) -> str:
        lines = [
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            self.machine,
            "Training alone, seconds per replica and epoch: medians and quartiles; "
            "ratios to other peers, more is faster.",
            "",
        ]
        frame = self.frame()
        for row in self.rows:
            table = frame[frame["work"] == row.work.name].drop(columns="work")
            table = table.dropna(axis="columns", how="all")
            lines += [row.work.name, table.to_string(index=False, float_format="{:.3g}".format)]
            if row.work.dataset == "random":
                shape = "×".join(map(str, row.work.image_shape))
                lines.append(f"Data: {row.work.images:,} images of random bytes, {shape}.")
            lines += [f"Without {peer}: {reason}" for peer, reason in row.skipped.items()] + [""]
        return "\n".join(lines).rstrip()

    def to_json(self) -> dict[str, object]:
        """Return everything as plain values, ratios included; times are seconds."""
        rows = [
            asdict(row) | {"ratios": {peer: row.against(peer) for peer in row.timings}}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}


def bench_fleet(
    *,
    seconds: float = 30.0,
    works: Sequence[Work] = WORKS,
    fleets: Mapping[str, Callable[[Work], Peer]] | None = None,
    compiled: bool = True,
) -> FleetBenchmark:
    """Measure; takes some minutes.

    In a script, call it under `if __name__ == "__main__":`, for it starts processes.

    Args:
        seconds: To spend on each work, at least; every peer gets seven turns in any case.
        works: What is trained.
        fleets: More peers by name, normlab's own: functions of a module, for they travel to the
            process that measures.
        compiled: Measure `torch.compile` too.
    """
    rows = []
    for work in works:
        with Workers(1) as workers:  # A new one each, so that no work inherits another's threads.
            rows.append(workers.submit(_measure, work, seconds, fleets or {}, compiled).result())
    extras = {
        package: version(package)
        for peer, (package, _) in _NEEDED.items()
        if peer not in _missing()
    }
    return FleetBenchmark(rows, versions() | extras, machine())


def peers(*, compiled: bool = True) -> dict[str, Callable[[Work], Peer]]:
    """Return what makes each peer, by name, in the order in which they are to be made.

    The tutorials' loop comes first: its loader forks, which is safe only before JAX has started.
    """
    makers: dict[str, Callable[[Work], Peer]] = {
        "tutorial": tutorial,
        "eager": eager,
        "compiled": compiled_eager,
        "jax": jax_fleet,
        "products": products,
        f"products of {REPLICAS}": stacked_products,
    }
    if not compiled:
        del makers["compiled"]
    return makers


def _missing() -> dict[str, str]:
    """Return the peers that cannot be measured, and why."""
    return {
        peer: f"{package} is not installed: pip install 'normlab[bench]'"
        for peer, (package, module) in _NEEDED.items()
        if find_spec(module) is None
    }


def _measure(
    work: Work, seconds: float, fleets: Mapping[str, Callable[[Work], Peer]], compiled: bool
) -> Row:
    makers = {**peers(compiled=compiled), **fleets}
    skipped = _missing()
    startup = math.nan if "tutorial" in skipped else _startup(work)
    made = {name: maker(work) for name, maker in makers.items() if name not in skipped}
    losses: dict[str, list[float]] = {}

    def kept(name: str, call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            if isinstance(loss := call(), float):
                losses.setdefault(name, []).append(loss)

        return run

    calls: dict[str, Callable[[], object]] = {}
    for name, (call, _) in made.items():
        calls[name] = kept(name, call)
        if name == "tutorial":  # Its loader fills up, which the next peer should not pay for.
            calls["rest"] = lambda: time.sleep(0.05)
    timings = take_turns(calls, seconds=seconds)
    for call, _ in made.values():
        if close := getattr(call, "close", None):
            close()
    return Row(
        work,
        {
            name: _per_epoch(
                timings[name],
                work.steps_per_epoch / steps,
                startup if name == "tutorial" else 0.0,
            )
            for name, (_, steps) in made.items()
        },
        {name: (series[0], series[-1]) for name, series in losses.items()},
        startup,
        skipped,
    )


def _per_epoch(call: Timing, calls: float, once: float) -> Timing:
    median, low, high = (once + calls * each for each in (call.median, call.low, call.high))
    return Timing(median, low, high, call.rounds)


# The tutorials' loop.


class _Images(Dataset[tuple[Tensor, int]]):
    """Images that become a PIL image and then a tensor, one by one, as torchvision's do."""

    def __init__(self, work: Work) -> None:
        images, labels = work.load()
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels = labels
        self.half = torch.full((work.image_shape[0], 1, 1), 0.5)
        self.centred = work.scaling == "-1..1"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.arrays[index])
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
        scaled = pixels.to(torch.float32).div(255)
        if self.centred:
            scaled = (scaled - self.half) / self.half
        return scaled, int(self.labels[index])


def _loader(work: Work, epochs: int) -> DataLoader[tuple[Tensor, int]]:
    """Return a loader of epochs on end: `shuffle=True` is the same sampler for one of them."""
    data = _Images(work)
    # A process of ours was spawned and would spawn; a tutorial gets what the platform starts with.
    start = multiprocessing.get_all_start_methods()[0] if work.loader_workers else None
    return DataLoader(
        data,
        batch_size=work.batch_size,
        sampler=RandomSampler(data, num_samples=epochs * len(data)),
        num_workers=work.loader_workers,
        drop_last=True,
        multiprocessing_context=start,
    )


def _startup(work: Work) -> float:
    """Return the seconds in which the loader's processes start, give a batch, and end."""
    loader = _loader(work, 1)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        batches = iter(loader)
        next(batches)
        del batches
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def tutorial(work: Work) -> Peer:
    """Train as tutorials write it: DataLoader, stock optimizer, `.item()` at every step."""
    network = work.build(0)
    optimizer = _optimizer(work)(network.parameters(), lr=work.lr)
    criterion = nn.CrossEntropyLoss()
    loader = iter(_loader(work, _EPOCHS))
    steps = 2 * min(STEPS, work.steps_per_epoch)

    def call() -> float:
        total = 0.0
        for _ in range(steps):
            images, labels = next(loader)
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / steps

    return call, steps


def _optimizer(work: Work) -> Any:
    return {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[work.optimizer]


# torch, with what it offers.


def eager(work: Work, *, compiled: bool = False) -> Peer:
    """Train with the data in memory and a fused optimizer, on all threads."""
    network = work.build(0)
    optimizer = _optimizer(work)(network.parameters(), lr=work.lr, fused=True)
    images, labels = work.load()
    batches = work.batches(0)
    steps = min(STEPS, work.steps_per_epoch)

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(scale(images[batch], work.scaling)), labels[batch])

    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True)

    def call() -> float:
        total = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(next(batches))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / steps

    return call, steps


def compiled_eager(work: Work) -> Peer:
    """Train likewise, with batch, forward pass, loss and their backward pass compiled as one."""
    return eager(work, compiled=True)


# The matrix products and convolutions alone.


def products(work: Work, *, replicas: int = 1) -> Peer:
    """Make the matrix products and convolutions of a step, forward and backward, and no more.

    Args:
        work: What would be trained.
        replicas: How many networks' products are stacked; convolutions follow one another, which
            is faster on a CPU than any way of stacking them.
    """
    operations: list[Callable[[], object]] = []
    steps = min(STEPS, work.steps_per_epoch)
    x = torch.rand(work.batch_size, *work.image_shape)
    with torch.no_grad():
        for _, layer in _layers(work.build(0)):
            y = layer(x)
            first = not operations  # Nobody asks for the gradient of the images.
            if isinstance(layer, nn.Linear):
                operations += _linear(x, layer.weight, y, replicas, first)
            elif isinstance(layer, nn.Conv2d):
                operations += [_convolution(x, layer.weight.detach(), y, first)] * replicas
            x = y

    def call() -> None:
        with torch.no_grad():
            for _ in range(max(1, steps // replicas)):
                for operation in operations:
                    operation()

    return call, max(1, steps // replicas) * replicas


def stacked_products(work: Work) -> Peer:
    """Make the products of a fleet."""
    return products(work, replicas=REPLICAS)


def _layers(network: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Return the layers in the order in which they are run."""
    return [(name, part) for name, part in network.named_modules() if not list(part.children())]


def _linear(
    x: Tensor, weight: Tensor, y: Tensor, replicas: int, first: bool
) -> list[Callable[[], object]]:
    x, weight, y = (each.detach().repeat(replicas, 1, 1) for each in (x, weight, y))
    pairs = [(x, weight.mT), (y.mT, x)] + [(y, weight)] * (not first)
    if replicas == 1:
        pairs = [(a[0], b[0]) for a, b in pairs]
    return [_product(a, b) for a, b in pairs]


def _product(a: Tensor, b: Tensor) -> Callable[[], object]:
    out = a @ b
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return lambda: multiply(a, b, out=out)


def _convolution(x: Tensor, weight: Tensor, y: Tensor, first: bool) -> Callable[[], object]:
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    wanted = [not first, True, False]
    forward, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward

    def both() -> None:
        # Their variants with `out=` compute and then copy, so they would be slower.
        forward(x, weight, None, *geometry)
        backward(y, x, weight, None, *geometry, wanted)

    return both


# JAX.


def jax_fleet(work: Work, *, replicas: int = REPLICAS) -> Peer:
    """Train replicas in JAX: `jit` of `scan` over steps of `vmap` over replicas.

    On a CPU, XLA runs convolutions several times slower inside a loop, and slower stacked, so a
    network that has any is trained in the form that is fastest in JAX: one replica, a program a
    step.
    """
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    steps = min(STEPS, work.steps_per_epoch)
    if any(isinstance(layer, nn.Conv2d) for _, layer in _layers(work.build(0))):
        replicas, span = 1, 1
    else:
        span = max(1, steps // replicas)
    programs = max(1, steps // (replicas * span))
    images, labels = (jnp.asarray(each.numpy()) for each in work.load())
    orders = [work.batches(seed) for seed in range(replicas)]
    state = jax_state(work, replicas)
    train = jax_trainer(work)

    def call() -> float:
        nonlocal state
        means = []
        for _ in range(programs):
            batches = np.stack([[next(order).numpy() for order in orders] for _ in range(span)])
            state, losses = train(state, images, labels, batches)
            means.append(losses.mean())
        return float(np.mean(jax.device_get(means)))

    return call, programs * span * replicas


def jax_state(work: Work, replicas: int) -> dict[str, Any]:
    """Return what JAX trains from: the values of `replicas` networks, stacked, by their names."""
    import jax.numpy as jnp

    networks = [work.build(seed) for seed in range(replicas)]

    def stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {
            name: jnp.asarray(np.stack([each[name].detach().numpy() for each in tensors]))
            for name in tensors[0]
        }

    parameters = stacked([dict(network.named_parameters()) for network in networks])
    state = {
        "parameters": parameters,
        "buffers": stacked([dict(network.named_buffers()) for network in networks]),
        "lr": jnp.full(replicas, work.lr),
        "step": jnp.zeros(replicas),
    }
    if work.optimizer == "adam":
        for moment in ("mean", "square"):
            state[moment] = {name: jnp.zeros_like(value) for name, value in parameters.items()}
    return state


def jax_trainer(work: Work) -> Any:
    """Return `train(state, images, labels, batches)`, compiled: the new state, and the losses.

    `batches` are indices, (steps, replicas, batch); losses are (steps, replicas).
    """
    import jax
    import jax.numpy as jnp

    factor, offset = SCALINGS[work.scaling]
    layers = _layers(work.build(0))

    def loss_of(parameters: Any, buffers: Any, x: Any, y: Any) -> Any:
        changed = dict(buffers)
        for name, layer in layers:
            x = _jax_layer(name, layer, parameters, changed, x)
        picked = jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1)
        return -picked.mean(), changed

    def step(state: Any, batch: Any, images: Any, labels: Any) -> Any:
        x, y = (each.at[batch].get(mode="promise_in_bounds") for each in (images, labels))
        # Channels go last: XLA's convolutions on a CPU want them there.
        x = jnp.moveaxis(x.astype(float) * factor + offset, 1, -1)
        (loss, buffers), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state["parameters"], state["buffers"], x, y
        )
        return _jax_update(work, state, gradients) | {"buffers": buffers}, loss

    def train(state: Any, images: Any, labels: Any, batches: Any) -> Any:
        def fleet_step(state: Any, batch: Any) -> Any:
            return jax.vmap(step, in_axes=(0, 0, None, None))(state, batch, images, labels)

        if len(batches) == 1:  # XLA would make a loop even of one.
            state, losses = fleet_step(state, batches[0])
            return state, losses[None]
        return jax.lax.scan(fleet_step, state, batches)

    return jax.jit(train, donate_argnums=0)


def _jax_layer(name: str, layer: nn.Module, parameters: Any, buffers: Any, x: Any) -> Any:
    """Apply what the torch layer does in training; a norm's new statistics go into `buffers`."""
    import jax
    import jax.numpy as jnp

    if isinstance(layer, nn.Flatten):
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # In torch's order, for its weights.
    if isinstance(layer, nn.ReLU):
        return jnp.maximum(x, 0)
    if isinstance(layer, nn.Sigmoid):
        return jax.nn.sigmoid(x)
    if isinstance(layer, nn.AvgPool2d):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
        raise NotImplementedError(f"{layer} is not written in JAX here")
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if isinstance(layer, nn.Linear):
        return x @ weight.T + bias
    if isinstance(layer, nn.Conv2d):
        layout = ("NHWC", "OIHW", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=layout)
        return y + bias
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    mean, variance = x.mean(axes), x.var(axes)
    momentum = layer.momentum or 0.0
    for key, value in (("mean", mean), ("var", variance * (count / (count - 1)))):
        running = buffers[f"{name}.running_{key}"]
        buffers[f"{name}.running_{key}"] = (1 - momentum) * running + momentum * value
    buffers[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    factor = weight * jax.lax.rsqrt(variance + layer.eps)
    return x * factor + (bias - mean * factor)


def _jax_update(work: Work, state: Any, gradients: Any) -> Any:
    """Return the state after a step of plain SGD, or of Adam with torch's defaults."""
    import jax
    import jax.numpy as jnp

    parameters, lr, step = state["parameters"], state["lr"], state["step"] + 1
    if work.optimizer == "sgd":
        moved = jax.tree.map(lambda p, g: p - lr * g, parameters, gradients)
        return state | {"parameters": moved, "step": step}
    first, second, eps = 0.9, 0.999, 1e-8
    mean = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state["mean"], gradients)
    square = jax.tree.map(
        lambda v, g: second * v + (1 - second) * g * g, state["square"], gradients
    )
    rate, correction = lr / (1 - first**step), jnp.sqrt(1 - second**step)
    moved = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) / correction + eps), parameters, mean, square
    )
    return state | {"parameters": moved, "mean": mean, "square": square, "step": step}
