"""What tests of folding and of conversion share."""

import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normlab

EXACT = {"rtol": 1e-11, "atol": 1e-11}
NORMS = (nn.modules.batchnorm._BatchNorm,)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny convolutions on many threads wait for one another more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prepared(model, dtype=torch.float64):
    """A model in evaluation, with batch norms that have seen something."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.is_floating_point():
                values = randn(*tensor.shape, seed=seed)
                tensor.copy_(0.5 + values.abs() if name.endswith("running_var") else values)
    return model


def state(model):
    """All of a model, to the bit."""
    parts = [(name, type(each), each.training) for name, each in model.named_modules()]
    identities = [(name, id(each), each.requires_grad) for name, each in model.named_parameters()]
    return parts, identities, pickle.dumps(model.state_dict())


def assert_folded(model, x, folded, left=(), prepare=True, **options):
    """Fold, and compare with the original on the example and on other values."""
    model = prepared(model) if prepare else model
    before = state(model)
    result, report = normlab.fold(model, x, **options)
    assert state(model) == before
    assert {name: tuple(into) for name, into in report.folded.items()} == folded
    assert sorted(report.left) == sorted(left)
    assert not any(each.training for each in result.modules())
    there = {name for name, each in result.named_modules() if isinstance(each, NORMS)}
    assert there == set(left)
    example = x if isinstance(x, tuple) else (x,)
    other = tuple(1 - 2 * each for each in example)
    with torch.no_grad():
        for values in (example, other):
            assert_close(result(*values), model(*values), **EXACT)
    assert report.removed == tuple(
        key for key in model.state_dict() if key not in result.state_dict()
    )
    assert report.added == tuple(
        key for key in result.state_dict() if key not in model.state_dict()
    )
    return result, report


def image(rank, channels=4):
    return randn(2, channels, *[7, 6, 5][:rank])


def net(function, **modules):
    """A module with a forward pass of a test's own."""
    result = type("Net", (nn.Module,), {"forward": function})()
    for name, module in modules.items():
        setattr(result, name, module)
    return result


def pair(conv, norm):
    return nn.Sequential(conv, norm).eval()
