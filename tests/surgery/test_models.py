import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import fx, nn

from normlab.errors import InputError
from normlab.surgery.models import (
    buffers_kept,
    copy_of,
    modes_kept,
    put_back_on_failure,
    run_on,
)


class Group:
    """As a process group, it is one of the process and not of a model."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def test_copies_share_the_process_group_of_synchronized_layers():
    group = Group()
    copied = copy_of(nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.ReLU()))
    assert copied[0].process_group is group


def test_copies_of_lazy_layers_are_as_lazy():
    model = nn.Sequential(nn.LazyBatchNorm1d(device="meta", dtype=torch.float16))
    copied = copy_of(model)
    for name, buffer in model.named_buffers():
        other = dict(copied.named_buffers())[name]
        assert other is not buffer
        assert type(other) is type(buffer)
        assert (other.device, other.dtype) == (buffer.device, buffer.dtype)


class Failure(BaseException):
    """Not an `Exception`, as the interrupt of a keyboard is none."""


@pytest.mark.parametrize("error", [None, Failure])
def test_modes_come_back(error):
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.ReLU())
    try:
        with modes_kept(model):
            model.train()
            model[1].eval()
            if error:
                raise error
    except Failure:
        pass
    assert [each.training for each in model.modules()] == [True, False, True]


@pytest.mark.parametrize("error", [None, Failure])
def test_buffers_come_back_where_they_were_with_what_they_held(error):
    """One is written to, one is replaced, and one needs a gradient."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer("learned", torch.ones(2, requires_grad=True))
    before = {name: (each, each.detach().clone()) for name, each in model.named_buffers()}
    try:
        with buffers_kept(model):
            model[0].running_mean.fill_(7)
            model[0].running_var = torch.full((2,), 7.0)
            model.learned.data.fill_(7)
            if error:
                raise error
    except Failure:
        pass
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        assert buffer.equal(before[name][1])


def break_all_of(model):
    traced = copy.deepcopy(model[0].graph)
    for node in traced.nodes:
        if node.target == "relu":
            node.target = "sigmoid"
    model[0].graph = traced
    model[1].__class__ = nn.BatchNorm2d
    model[1].added, model[1].note = "more", "other"
    model[1]._forward_pre_hooks.clear()
    model[1]._non_persistent_buffers_set.clear()
    model[1]._buffers["running_mean"] = None
    del model[1].eps
    model[0].norm.extra = nn.Linear(2, 2)
    object.__setattr__(model[0].norm, "__dict__", {**vars(model[0].norm), "momentum": 0.5})
    model[1] = nn.Identity()
    raise Failure


def test_what_fails_leaves_classes_attributes_hooks_and_graphs():
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x).relu()

    model = nn.Sequential(fx.symbolic_trace(Traced()), nn.BatchNorm1d(2))
    model[1].register_buffer("extra", torch.ones(2), persistent=False)
    model[1].note = "mine"
    calls = []
    model[1].register_forward_pre_hook(lambda *_: calls.append(1))
    held, x = list(model.modules()), torch.tensor([[1.0, -2.0], [3.0, 5.0]])
    places = [vars(each) for each in held]
    expected, keys = copy.deepcopy(model)(x), list(model.state_dict())
    with pytest.raises(Failure), put_back_on_failure(model):
        break_all_of(model)
    assert all(one is other for one, other in zip(model.modules(), held, strict=True))
    assert all(vars(each) is place for each, place in zip(held, places, strict=True))
    assert type(model[1]) is nn.BatchNorm1d
    assert (model[1].note, hasattr(model[1], "added")) == ("mine", False)
    assert list(model.state_dict()) == keys
    assert model[0].norm.momentum == 0.1
    calls.clear()
    assert model(x).equal(expected)
    assert calls == [1]


class Pair(NamedTuple):
    image: object
    label: object


class Takes(nn.Module):
    def forward(self, image, label=None):
        self.got = (image, label)
        return image


def test_what_a_model_gets_of_a_batch():
    model, x, y = Takes(), torch.ones(2), torch.zeros(2)
    for batch in (x, [x, y], (x, y), Pair(x, y)):
        assert run_on(model, batch) is x
        assert model.got == (x, None)
    run_on(model, OrderedDict(label=y, image=x))
    assert model.got == (x, y)
    for batch, kind in (("text", "str"), ((), "tuple"), ([], "list")):
        with pytest.raises(InputError, match=f"^a batch is a {kind}: expected a tensor"):
            run_on(model, batch)


def test_every_tensor_of_a_batch_is_moved_and_nothing_else_is_changed():
    def tensor():
        return torch.ones(2)

    batch = {"pair": Pair(tensor(), "label"), "list": [tensor(), (tensor(), 3)]}
    seen = run_on(nn.Identity(), batch, lambda _, given: given, "meta")
    assert seen["pair"].label == "label"
    assert seen["pair"].image.is_meta
    assert type(seen["list"]) is list
    assert seen["list"][0].is_meta
    assert type(seen["list"][1]) is tuple
    assert seen["list"][1][0].is_meta
    assert seen["list"][1][1] == 3
    assert run_on(nn.Identity(), tensor(), device="meta").is_meta
    assert run_on(nn.Identity(), batch, lambda _, given: given) is batch
