import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from normlab.errors import InputError
from normlab.training import Recipe, Replica
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
