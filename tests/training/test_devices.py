import os
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from normlab.errors import InputError
from normlab.training import Recipe, Replica, graphs
from normlab.training.devices import exact_products, find_device, name_of
from normlab.training.engine import run_replicas

QUICK = Recipe(validation=59_000, epochs=1, network="mlp:8", optimizer="sgd")
REPLICAS = [Replica("plain", 0.01, 0)]


def test_on_a_device_that_stands_in_for_a_gpu():
    tests = Path(__file__).with_name("on_a_device.py")
    options = ["-q", "--show-capture=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)],
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["cuda:77", "meta", "gpu", ""])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(InputError, match=f"^device '{name}' cannot be used \\(.+\\): expected cpu"):
        list(run_replicas(QUICK, REPLICAS, device=name))


def test_the_cpu_is_a_device():
    assert name_of(find_device("cpu")) == "cpu"


@pytest.fixture(params=["allowed", "forbidden"])
def users_settings(request, monkeypatch):
    """Those of somebody who wants speed, and what says what they are."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings():
        return (
            *(matmul.fp32_precision, cudnn.conv.fp32_precision),
            *(cudnn.deterministic, cudnn.benchmark),
        )

    before = settings()
    matmul.fp32_precision, cudnn.benchmark = "tf32", True
    if request.param == "forbidden":  # By torch.backends.disable_global_flags().
        monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)
    yield settings
    monkeypatch.undo()
    matmul.fp32_precision, cudnn.conv.fp32_precision = before[:2]
    cudnn.deterministic, cudnn.benchmark = before[2:]


EXACT = ("ieee", "ieee", True, False)


def test_products_are_exact_for_a_while(users_settings):
    before = users_settings()
    assert before != EXACT
    with exact_products():
        assert users_settings() == EXACT
    assert users_settings() == before
    with pytest.raises(ZeroDivisionError), exact_products():
        raise ZeroDivisionError
    assert users_settings() == before


def test_products_are_exact_while_a_fleet_trains(users_settings):
    before = users_settings()
    with closing(run_replicas(QUICK, REPLICAS)) as events:
        next(events)
        assert users_settings() == EXACT
    assert users_settings() == before


class FakeCuda:
    """What CUDA graphs need of `torch.cuda`, which notes what is asked of it."""

    def __init__(self):
        self.told = []

    @contextmanager
    def device(self, device):
        self.told.append(f"on {device}")
        yield

    def Stream(self):  # noqa: N802 - torch's name
        return SimpleNamespace(wait_stream=lambda _: self.told.append("side waits for usual"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda _: self.told.append("usual waits for side"))

    @contextmanager
    def stream(self, _):
        self.told.append("side begins")
        yield
        self.told.append("side ends")

    def CUDAGraph(self):  # noqa: N802 - torch's name
        return SimpleNamespace(replay=lambda: self.told.append("replayed"))

    @contextmanager
    def graph(self, _):
        self.told.append("recording begins")
        yield
        self.told.append("recording ends")


def test_a_cuda_graph_is_warmed_up_aside_recorded_once_and_replayed(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    monkeypatch.setitem(graphs.GRAPHS, "cpu", graphs._CudaGraph)
    moved, given = torch.zeros(2), torch.ones(2)

    def step(fed):
        fake.told.append("step")
        moved.add_(fed[0])

    recorded = graphs.Recorded(step, [given], [moved])
    assert fake.told == [
        *("on cpu", "side waits for usual"),
        *("side begins", "step", "step", "step", "side ends", "usual waits for side"),
        *("on cpu", "recording begins", "step", "recording ends"),
    ]
    assert moved.tolist() == [1.0, 1.0]  # Here recording is doing; of the warm-up nothing is left.
    fake.told.clear()
    recorded([torch.full((2,), 5.0)])
    assert fake.told == ["on cpu", "replayed"]
    assert (recorded._fed[0].tolist(), given.tolist()) == ([5.0, 5.0], [1.0, 1.0])
