import os
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from normlab.errors import InputError
from normlab.training import Recipe, Replica, engine, graphs
from normlab.training.devices import compute_exactly, exact_products, find_device, name_of

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
        list(engine.run_replicas(QUICK, REPLICAS, device=name))


def test_the_cpu_is_a_device():
    assert name_of(find_device("cpu")) == "cpu"


@pytest.fixture(params=["allowed", "forbidden"])
def users_settings(request, monkeypatch):
    """Those of somebody who wants speed, and what says what they are."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings():
        return (
            *(matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision),
            *(cudnn.deterministic, cudnn.benchmark),
        )

    def may_be_set(flag):  # As torch.backends.disable_global_flags() forbids it.
        place = torch.backends.disable_global_flags.__globals__
        monkeypatch.setitem(place, "__allow_nonbracketed_mutation_flag", flag)

    before = settings()
    may_be_set(True)
    matmul.fp32_precision, cudnn.benchmark = "tf32", True
    may_be_set(request.param == "allowed")
    yield settings
    may_be_set(True)
    matmul.fp32_precision = before[0]
    cudnn.deterministic, cudnn.benchmark = before[3:]


CUDA = torch.device("cuda")


def test_products_are_exact_for_a_while(users_settings):
    before = users_settings()
    with exact_products(torch.device("cpu")):
        assert users_settings() == before
    with exact_products(CUDA):
        assert users_settings() == ("ieee", "ieee", "ieee", True, False)
        # As torch.export does, and as a user's network may: the old settings are read, and agree.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pass
        torch.backends.cudnn.set_flags(False)
        torch.backends.cudnn.set_flags(True)
    assert users_settings() == before
    with pytest.raises(ZeroDivisionError), exact_products(CUDA):
        raise ZeroDivisionError
    assert users_settings() == before
    compute_exactly(torch.device("cpu"))
    assert users_settings() == before


def test_products_are_exact_while_a_fleet_trains(monkeypatch):
    told = []

    @contextmanager
    def exactly(device):
        told.append(f"begun on {device}")
        yield
        told.append("ended")

    monkeypatch.setattr(engine, "exact_products", exactly)
    with closing(engine.run_replicas(QUICK, REPLICAS)) as events:
        next(events)
        assert told == ["begun on cpu"]
        for _ in events:
            pass
    assert told == ["begun on cpu", "ended"]


class FakeCuda:
    """What CUDA graphs need of `torch.cuda`, which notes what is asked of it."""

    def __init__(self):
        self.told, self.now = [], "usual"
        self.Stream, self.CUDAGraph = self._new_stream, self._new_graph

    def _stream(self, name):
        return SimpleNamespace(
            name=name,
            device="cpu",
            wait_stream=lambda other: self.told.append(f"{name} waits for {other.name}"),
        )

    def _new_stream(self, device):
        self.told.append(f"a stream of {device}")
        return self._stream("aside")

    def current_stream(self, device):
        assert device == "cpu"
        return self._stream(self.now)

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    def _new_graph(self):
        return SimpleNamespace(replay=lambda: self.told.append(f"{self.now}: replayed"))

    @contextmanager
    def graph(self, _, stream):
        self.now = stream.name
        self.told.append(f"{self.now}: recording")
        yield  # Like torch's, it leaves the stream where it is if recording fails.
        self.told.append(f"{self.now}: recorded")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    monkeypatch.setitem(graphs.GRAPHS, "cpu", graphs._CudaGraph)
    graphs._aside.cache_clear()
    yield fake
    graphs._aside.cache_clear()


def test_a_cuda_graph_is_warmed_up_aside_recorded_once_and_replayed(cuda):
    moved, given = torch.zeros(2), torch.ones(2)

    def step(fed):
        cuda.told.append(f"{cuda.now}: step")
        moved.add_(fed[0])

    recorded = graphs.Recorded(step, [given], [moved])
    assert cuda.told == [
        *("a stream of cpu", "aside waits for usual"),
        *["aside: step"] * 3,
        *("usual waits for aside", "aside: recording", "aside: step", "aside: recorded"),
    ]
    assert moved.tolist() == [1.0, 1.0]  # Here recording is doing; of the warm-up nothing is left.
    cuda.told.clear()
    recorded([torch.full((2,), 5.0)])
    assert cuda.told == ["usual: replayed"]
    assert (recorded._fed[0].tolist(), given.tolist()) == ([5.0, 5.0], [1.0, 1.0])


def test_a_recording_that_fails_leaves_the_usual_stream(cuda):
    def step(_):
        if "aside: recording" in cuda.told:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.Recorded(step, [torch.ones(2)], [torch.zeros(2)])
    assert cuda.now == "usual"
