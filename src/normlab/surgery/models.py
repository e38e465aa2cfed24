"""What operations share: copies of models, their modes, their batch norms, and their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from normlab.errors import InputError

__all__ = [
    "Forward",
    "batch_norms",
    "buffers_kept",
    "copy_of",
    "modes_kept",
    "put_back_on_failure",
    "run_on",
]

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch of the user's."""


def copy_of(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return what to operate on: a deep copy, with a way around what torch cannot copy.

    Args:
        model: The user's.
        inplace: Return the model itself.

    Raises:
        InputError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if inplace:
        return model
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            memo[id(module.process_group)] = module.process_group
    for buffer in model.buffers():
        if isinstance(buffer, UninitializedBuffer):
            options: Any = {"device": buffer.device, "dtype": buffer.dtype}
            memo[id(buffer)] = UninitializedBuffer(**options)
    return copy.deepcopy(model, memo)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module of a model the mode back that it has now, when the context ends.

    >>> model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.ReLU())
    >>> with modes_kept(model):
    ...     _ = model.train()
    >>> [each.training for each in model.modules()]
    [True, False, True]
    """
    modes = {each: each.training for each in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer of a model the values back that it has now, when the context ends.

    >>> model = nn.BatchNorm1d(1)
    >>> with buffers_kept(model):
    ...     _ = model(torch.tensor([[1.0], [3.0]]))
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0.]), tensor(0))
    """
    places = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, buffers in places:
                for name, buffer in buffers.items():
                    if getattr(module, name) is not buffer:
                        setattr(module, name, buffer)
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Give every module its class and attributes back if the context ends with an error.

    Tensors are not copied: what the context wants to change of them it must replace.

    >>> model = nn.Sequential(nn.ReLU())
    >>> try:
    ...     with put_back_on_failure(model):
    ...         model[0] = nn.Identity()
    ...         raise ValueError
    ... except ValueError:
    ...     model[0]
    ReLU()
    """
    before = [
        (
            each,
            type(each),
            vars(each),
            {name: _shallow(value) for name, value in vars(each).items()},
        )
        for each in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            object.__setattr__(module, "__dict__", attributes)
            for name in attributes.keys() - contents.keys():
                del attributes[name]
            for name, (value, content) in contents.items():
                attributes[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
            if isinstance(module, fx.GraphModule):
                module.recompile()
        raise


def _shallow(value: Any) -> tuple[Any, Any]:
    """Return a value, and a copy of it if it can change without being set."""
    return value, copy.copy(value) if isinstance(value, (dict, set)) else None


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return a model's batch norm layers, of whatever class, by their qualified names.

    >>> list(batch_norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))))
    ['1']
    """
    return {name: each for name, each in model.named_modules() if isinstance(each, _BatchNorm)}


def run_on(
    model: nn.Module,
    batch: Any,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Run a model on a batch as a loader yields it.

    Args:
        model: To run.
        batch: A tensor, which is what the model gets; a tuple or list, of which it gets the first;
            or a mapping, which it gets by keywords.
        forward: Runs the model on any other batch, or in another way.
        device: What tensors in the batch are moved to; left where they are by default.

    Raises:
        InputError: The batch is none of these.

    >>> run_on(nn.Identity(), (torch.ones(2), "labels"))
    tensor([1., 1.])
    """
    if device is not None:
        batch = _moved(batch, device)
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise InputError(
        f"a batch is a {type(batch).__name__}: expected a tensor, a tuple or list whose first is "
        "what the model gets, or a mapping of its keywords; else say how with forward=, a function "
        "of the model and the batch"
    )


def _moved(batch: Any, device: torch.device | str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(each, device) for each in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(each, device) for each in batch)
    return batch
