"""`normlab bench layers`: batch norm alone and with what follows it, against torch's.

Every row is a shape, a memory layout and a job. The peers take turns in one process of its own,
whose C library keeps freed memory, so that none pays for pages that another gave back. The memory
floor is the time of the passes over memory that no implementation can avoid, at the speed at which
this machine copies between as many tensors of that size as the job has: in training x to y and the
gradient of y to that of x, in inference x to y.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from normlab.bench.timing import Timing, machine, take_turns, versions
from normlab.layers import BatchNorm1d, BatchNorm2d
from normlab.networks import build_network
from normlab.processes import Workers
from normlab.surgery import convert

__all__ = ["LayersBenchmark", "bench_layers"]

SHAPES = [
    (32, 64, 56, 56),
    (64, 256, 14, 14),
    (256, 6, 24, 24),
    (128, 128, 16, 16),
    (4096, 512),
    (256, 120),
    (32, 32),
]
# Training reads x and writes y, then reads x and the gradient and writes one; inference reads and
# writes once.
JOBS = {
    "training, BN + ReLU": ("relu", True, 5),
    "training, BN": (None, True, 5),
    "inference, BN + ReLU": ("relu", False, 2),
}
NETWORKS = {
    "resnet18, batch 64": ("resnet18", (3, 32, 32), 64),
    "lenet, batch 256": ("lenet", (1, 28, 28), 256),
}
_MEGABYTES = 64


@dataclass(frozen=True)
class Row:
    """One shape, layout and job: seconds of each peer."""

    shape: tuple[int, ...]
    layout: str
    job: str
    timings: dict[str, Timing]
    floor: float


@dataclass(frozen=True)
class LayersBenchmark:
    """All that was measured.

    Attributes:
        rows: Of the layers.
        networks: Of a training step of whole networks: torch's batch norm, converted, and none.
        memory: Peak memory of a BN + ReLU training step above its input, in activations.
        versions: Of normlab, torch and Python.
        machine: Its processor, vector instructions and threads.
    """

    rows: list[Row]
    networks: dict[str, dict[str, Timing]]
    memory: dict[str, float]
    versions: dict[str, str]
    machine: str

    def frame(self) -> pd.DataFrame:
        """Return a row for each shape, layout and job: milliseconds, and ratios to normlab."""
        return pd.DataFrame([_columns(row) for row in self.rows])

    def __str__(self) -> str:
        lines = [
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            self.machine,
            "Medians; ratios are to normlab, more is better for it.",
            "",
        ]
        for job, rows in self.frame().groupby("job", sort=False):
            table = rows.drop(columns="job").dropna(axis="columns", how="all")
            lines += [str(job), table.to_string(index=False, float_format="{:.3g}".format), ""]
        lines.append("Whole networks, a training step without its optimizer")
        for name, timings in self.networks.items():
            stock, ours, without = (timings[key].median for key in ("torch", "normlab", "without"))
            lines.append(
                f"{name}: torch {stock * 1e3:.1f} ms, normlab {ours * 1e3:.1f} ms, "
                f"{stock / ours:.2f}×; {1 - without / stock:.0%} of torch's was batch norm"
            )
        lines.append("")
        lines.append(
            "Peak memory of a BN + ReLU training step above its input and gradient, in "
            "activations: " + ", ".join(f"{peer} {peak:.2f}" for peer, peak in self.memory.items())
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return everything as plain values; times are seconds."""
        return asdict(self)


def bench_layers(
    *,
    seconds: float = 2.0,
    compiled: bool = True,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    networks: Mapping[str, tuple[str, tuple[int, int, int], int]] = NETWORKS,
) -> LayersBenchmark:
    """Measure; takes some minutes, most of them compilation.

    In a script, call it under `if __name__ == "__main__":`, for it starts a process.

    Args:
        seconds: To spend on each row.
        compiled: Measure `torch.compile` too, on BN + ReLU in training.
        shapes: Of the inputs, (N, C) or (N, C, H, W).
        networks: What is timed as a whole: network, shape of an image and batch size, by name.
    """
    with Workers(1) as workers:
        return workers.submit(_measure, seconds, compiled, shapes, networks).result()


def _measure(
    seconds: float,
    compiled: bool,
    shapes: Sequence[tuple[int, ...]],
    networks: Mapping[str, tuple[str, tuple[int, int, int], int]],
) -> LayersBenchmark:
    rows = [
        _row(shape, layout, job, seconds, compiled)
        for job in JOBS
        for shape in shapes
        for layout in (("NCHW", "channels_last") if len(shape) == 4 else ("(N, C)",))
    ]
    return LayersBenchmark(
        rows=rows,
        networks={name: _network(*spec, seconds=5 * seconds) for name, spec in networks.items()},
        memory={peer: _peak_memory(peer) for peer in ("torch", "normlab")},
        versions=versions(),
        machine=machine(),
    )


def _row(shape: tuple[int, ...], layout: str, job: str, seconds: float, compiled: bool) -> Row:
    activation, training, passes = JOBS[job]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout == "channels_last":
        x, grad = (each.to(memory_format=torch.channels_last) for each in (x, grad))
    pairs = [(x, torch.empty_like(x))] + [(grad, torch.empty_like(x))] * training
    layers: dict[str, Any] = {}
    stock, ours = (nn.BatchNorm1d, BatchNorm1d) if x.ndim == 2 else (nn.BatchNorm2d, BatchNorm2d)
    follow = [nn.ReLU()] if activation else []
    layers["torch"] = nn.Sequential(stock(shape[1]), *follow)
    layers["normlab"] = ours(shape[1], activation=activation)
    if compiled and activation and training:
        torch.compiler.reset()
        layers["torch compiled"] = torch.compile(nn.Sequential(stock(shape[1]), *follow))
        layers["normlab compiled"] = torch.compile(ours(shape[1], activation=activation))
    peers: dict[str, Callable[[], object]] = {
        name: _training_step(layer, x, grad) if training else _inference(layer, x)
        for name, layer in layers.items()
    }
    peers["copy"] = lambda: [to.copy_(source) for source, to in pairs]
    timings = take_turns(peers, seconds=seconds)
    return Row(shape, layout, job, timings, timings["copy"].median / (2 * len(pairs)) * passes)


def _training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def step() -> None:
        leaf.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(leaf).backward(grad)

    return step


def _inference(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    layer.eval()

    def infer() -> None:
        with torch.inference_mode():
            layer(x)

    return infer


def _network(
    name: str, image_shape: tuple[int, int, int], batch: int, seconds: float
) -> dict[str, Timing]:
    """Time a training step without its optimizer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *image_shape, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    stock = build_network(name, "torch-batch", 0, image_shape=image_shape, classes=10)
    plain = build_network(name, "plain", 0, image_shape=image_shape, classes=10)
    networks = {"torch": stock, "normlab": convert(stock)[0], "without": plain}

    def stepper(network: nn.Module) -> Callable[[], None]:
        def step() -> None:
            for parameter in network.parameters():
                parameter.grad = None
            nn.functional.cross_entropy(network(x), y).backward()

        return step

    return take_turns({key: stepper(each) for key, each in networks.items()}, seconds=seconds)


def _peak_memory(peer: str) -> float:
    """Return the peak of a training step in a process of its own, in activations.

    Not a number where there is no `/proc`. What `getrusage` tells is no use: it starts at the peak
    of the process that this one was started from.
    """
    if not Path("/proc/self/status").exists():
        return math.nan
    script = f"""
import torch
from normlab import BatchNorm2d
x = torch.randn(16, 64, 128, {_MEGABYTES * 2**20 // (16 * 64 * 128 * 4)}).requires_grad_()
grad = torch.ones_like(x)
layers = {{
    "torch": torch.nn.Sequential(torch.nn.BatchNorm2d(64), torch.nn.ReLU()),
    "normlab": BatchNorm2d(64, activation="relu"),
}}
layers[{peer!r}](x[:1]).backward(grad[:1])
x.grad = None
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = peak()
layers[{peer!r}](x).backward(grad)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024 / _MEGABYTES


def _columns(row: Row) -> dict[str, object]:
    ours = row.timings["normlab"].median
    medians = {name: timing.median for name, timing in row.timings.items() if name != "copy"}
    columns: dict[str, object] = {
        "shape": "×".join(map(str, row.shape)),
        "layout": row.layout,
        "job": row.job,
    }
    columns |= {f"{name}, ms": median * 1e3 for name, median in medians.items()}
    columns["against torch"] = medians["torch"] / ours
    if "torch compiled" in medians:
        columns["compiled against compiled"] = (
            medians["torch compiled"] / medians["normlab compiled"]
        )
    columns["share of the memory floor's speed"] = row.floor / ours
    return columns
