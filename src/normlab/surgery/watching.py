"""Who feeds whom in a model: what one run on an example shows, whatever code the model is made of.

Layers tell when they are called, by hooks; in between, every operation on tensors tells what it
reads. Tensors are known by their memory, so that views and changes in place are seen too, and a
weak reference to it says afterwards whether anybody has kept what a layer returned.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "Place", "Step", "Watch", "is_hooked", "place", "tensors_in"]


class Place(NamedTuple):
    """Where a tensor's values lie: equal places hold the same tensor."""

    memory: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Step(NamedTuple):
    """An operation: its name, the tensors that it read in order, and the one that it made."""

    name: str
    reads: tuple[Place | None, ...]
    makes: Place | None


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: What was called.
        input: The first tensor that it got; None if that is no argument of its own.
        maker: The call that returned it.
        others: What else it got, by position or name: for each tensor, the call that returned it.
        output: What it returned, if that is one tensor.
        steps: Operations that it did itself.
        parts: For each call of its children, the name, and what went in and came out.
    """

    layer: nn.Module
    input: Place | None
    maker: Call | None
    others: dict[str, list[Call | None]]
    output: Place | None = None
    steps: list[Step] = dataclasses.field(default_factory=list)
    parts: list[tuple[str, Place | None, Place | None]] = dataclasses.field(default_factory=list)


class Watch:
    """Watches layers while the model that they are in runs.

    The model is a copy made for this, since the hooks stay.

    Args:
        model: The copy.
        layers: What to watch in it.

    Attributes:
        calls: The calls of each layer, in order.
        log: The calls of all layers, in order.
        makers: By memory, the call that returned it.
        readers: By memory, who read it after that: a call of a layer, or the name of a step.
        outsiders: For each layer, who read its parameters or buffers other than itself.
        kept: Memory that somebody holds after the run.
        functional: Names of modules that call batch norms with running statistics themselves.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    >>> watch = Watch(model, list(model))
    >>> _ = watch.run(lambda: model(torch.rand(4, 3)))
    >>> made, normed = watch.calls[model[0]][0], watch.calls[model[1]][0]
    >>> made.output == normed.input, watch.readers[made.output.memory] == [normed]
    (True, True)
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
        self.log: list[Call] = []
        self.makers: dict[int, Call] = {}
        self.readers: dict[int, list[Call | str]] = {}
        self.outsiders: dict[nn.Module, list[str]] = {layer: [] for layer in self.calls}
        self.kept: set[int] = set()
        self.functional: list[str] = []
        self._inside: list[str] = []
        self._open: list[Call] = []
        self._in_part = 0
        # A dead tensor's memory is not used again while it is referred to, so that no two tensors
        # of one run are mistaken for each other.
        self._references: dict[int, StorageWeakRef] = {}
        self._owners: dict[int, set[nn.Module]] = {}
        for name, module in model.named_modules():
            if module in self.calls:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if (where := place(tensor)) is not None:
                        self._owners.setdefault(where.memory, set()).add(module)
                self._listen(module)
            elif not isinstance(module, torch.jit.ScriptModule):  # Which takes no hooks.
                if is_hooked(module):
                    self._listen_to_hooks(name, module)
                self._follow(name, module)

    def run(self, forward: Any) -> Any:
        """Return what a function returns, and watch the layers while it runs."""
        with torch.no_grad(), _Escapes(self), _Steps(self):
            output = forward()
        if not all(each.expired() for each in self._references.values()):
            gc.collect()
        self.kept = {memory for memory, each in self._references.items() if not each.expired()}
        return output

    def _listen(self, layer: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            named = {**dict(enumerate(args)), **kwargs}
            first = 0 if args else "input"
            value = named.pop(first, None)
            others = {str(key): self._makers_of(each) for key, each in named.items()}
            where = place(value) if isinstance(value, Tensor) else None
            maker = next(iter(self._makers_of(value)), None) if where else None
            self._open.append(Call(layer, where, maker, others))

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            call = self._open.pop()
            self.calls[layer].append(call)
            self.log.append(call)
            call.output = place(output) if isinstance(output, Tensor) else None
            if call.output is None:
                return
            memory = call.output.memory
            if memory in self.makers:
                self.readers[memory].append(f"{type(layer).__name__}, which changes it in place")
            else:
                self.makers[memory], self.readers[memory] = call, []
                with torch._C.DisableTorchFunction():
                    self._references[memory] = StorageWeakRef(output.untyped_storage())

        layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        layer.register_forward_hook(leave, always_call=True)
        for name, part in layer.named_children():
            self._listen_to_part(name, part)

    def _listen_to_part(self, name: str, part: nn.Module) -> None:
        inputs: list[Place | None] = []

        def enter(_: nn.Module, args: Any) -> None:
            self._in_part += 1
            inputs.append(place(args[0]) if args and isinstance(args[0], Tensor) else None)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._in_part -= 1
            made = place(output) if isinstance(output, Tensor) else None
            if self._open:
                self._open[-1].parts.append((name, inputs.pop(), made))

        part.register_forward_pre_hook(enter, prepend=True)
        part.register_forward_hook(leave, always_call=True)

    def _listen_to_hooks(self, name: str, module: nn.Module) -> None:
        def note(_: nn.Module, *values: Any) -> None:
            for where in map(place, tensors_in(values)):
                if where is not None:
                    self._read_by(f"hooks of {name or 'the model'}", where.memory)

        module.register_forward_hook(note)  # Which gets the arguments too.

    def _follow(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self._inside.append(name), prepend=True)

        def leave(*_: Any) -> None:
            self._inside.pop()

        module.register_forward_hook(leave, always_call=True)

    def _makers_of(self, value: Any) -> list[Call | None]:
        """Return who made tensors, which is asked at once: what nobody holds may be overwritten."""
        places = map(place, tensors_in(value))
        return [None if where is None else self.makers.get(where.memory) for where in places]

    def _read_by(self, reader: Call | str, memory: int) -> None:
        readers = self.readers.get(memory)
        if readers is not None and reader not in readers:
            readers.append(reader)

    def normalize(self, running_mean: Tensor | None) -> None:
        """Note a functional batch norm, unless it is a layer's own."""
        if running_mean is not None and not self._open and self._inside:
            self.functional.append(self._inside[-1])

    def step(self, name: str, reads: list[Tensor], made: Any, *, view: bool = False) -> None:
        """Note an operation; who looks at values through a view is noted when they do."""
        call = self._open[-1] if self._open else None
        places = tuple(map(place, reads))
        for where in places:
            if where is not None:
                if not view:
                    self._read_by(call or name, where.memory)
                for owner in self._owners.get(where.memory, ()):
                    if call is None or call.layer not in self._owners[where.memory]:
                        self.outsiders[owner].append(name)
        if call is not None and places and not self._in_part:
            first = made[0] if isinstance(made, tuple) and made else made
            makes = place(first) if isinstance(first, Tensor) else None
            call.steps.append(Step(name, places, makes))


class _Steps(TorchDispatchMode):
    """Tells a watch what torch computes, whoever asked for it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        aliases = [each.alias_info for each in func._schema.returns]
        view = bool(aliases) and all(each is not None and not each.is_write for each in aliases)
        name = str(func).split(".")[1]
        self.watch.step(name, list(tensors_in((args, kwargs))), made, view=view)
        return made


class _Escapes(TorchFunctionMode):
    """Tells a watch where memory is handed to what torch does not compute, and what normalizes."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ESCAPES:
            self.watch.step(func.__name__, list(tensors_in((args, kwargs))), None)
        elif func is F.batch_norm or func is torch.batch_norm:
            position = 1 if func is F.batch_norm else 3
            named = (kwargs or {}).get("running_mean")
            self.watch.normalize(args[position] if len(args) > position else named)
        return func(*args, **(kwargs or {}))


_ESCAPES = ("__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage")


def place(tensor: Tensor) -> Place | None:
    """Return where a tensor lies, or None if it has no memory of its own (sparse tensors, meta).

    >>> x = torch.zeros(4)
    >>> place(x) == place(x.detach()), place(x) == place(x[:2])
    (True, False)
    """
    with torch._C.DisableTorchFunction():
        try:
            memory = tensor.untyped_storage()._cdata
            return Place(memory, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
        except (NotImplementedError, RuntimeError):
            return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and dataclasses, in order.

    >>> [each.item() for each in tensors_in({"a": (torch.tensor(1), [torch.tensor(2)]), "b": "c"})]
    [1, 2]
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a user's hooks see what a module gets or returns, or their gradients."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
