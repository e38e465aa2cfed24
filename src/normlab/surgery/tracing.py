"""Forward passes as graphs, where a graph says all that the code does; and graphs as forwards.

`torch.fx` follows the code of a forward pass once, with stand-ins for tensors. What the code does
beside them is lost or baked in without a word: a branch on the mode or on a random number, a
counter, `no_grad`, a derivative of one's own. So a forward pass is traced twice, with all of that
changed or watched, and what cannot be told faithfully is not told.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import operator
import random
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from torch import fx, nn

from normlab.errors import InputError
from normlab.streams import generators_kept

__all__ = [
    "Trace",
    "before_rewriting",
    "in_place",
    "names_read",
    "public_methods",
    "rewrite",
    "same_steps",
    "trace",
]


class Trace(NamedTuple):
    """What tracing a module found.

    Attributes:
        graphs: Of training with gradients and of evaluation without; none if tracing failed.
        reason: Why the first graph cannot stand for the code; empty if it can.
    """

    graphs: list[fx.Graph]
    reason: str


def trace(module: nn.Module) -> Trace:
    """Trace the forward pass of one module, in which the modules below are single steps.

    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return x * 2 if self.training else x
    >>> trace(Twice()).reason
    'depends on the mode'
    """
    cls = type(module)
    if "forward" in vars(module):
        return Trace([], "was set on the object")
    if not isinstance(module, fx.GraphModule) and (
        cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    ):
        return Trace([], "belongs to a class with a way of its own to be pickled")
    arguments = list(inspect.signature(cls.forward).parameters.values())[1:]
    if any(each.default is not each.empty or each.kind in _VARIADIC for each in arguments):
        return Trace([], "has optional arguments, whose absence cannot be traced")
    before = [(each, _contents(vars(each))) for each in module.modules()]
    modes = {each: each.training for each in module.modules()}
    graphs = []
    try:
        for training in (True, False):
            for each in modes:
                each.training = training
            with _unchanged_randomness(), torch.set_grad_enabled(training):
                graphs.append(_Tracer().trace(module))
            for each, mode in modes.items():
                each.training = mode
            if not all(_same(_contents(vars(each)), contents) for each, contents in before):
                raise fx.proxy.TraceError("it changes attributes")
    except Exception as error:  # Tracing runs the user's code, which may raise anything.
        return Trace([], f"cannot be traced: {str(error).splitlines()[0] if str(error) else error}")
    finally:
        for each, contents in before:
            _restore(vars(each), contents)
        for each, mode in modes.items():
            each.training = mode
    return Trace(graphs, "" if same_steps(*graphs) else "depends on the mode")


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _Value(fx.Proxy):
    """The stand-in for a tensor; code that asks for its type would take the wrong branch."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "torch":
            return _Value
        raise fx.proxy.TraceError("it asks for the type of a value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise fx.proxy.TraceError(f"it sets {name} of a value")
        super().__setattr__(name, value)


def in_place(operation: str, value: Any, other: Any) -> Any:
    """Do `value += other` or its like, named as in `operator`; `torch.fx` would make it a `+`."""
    return getattr(operator, operation)(value, other)


def _step_in_place(name: str) -> Any:
    def step(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})

    return step


for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(_Value, f"__{_name}__", _step_in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # Changes of buffers become steps.

    def __init__(self) -> None:
        # Otherwise a checkpoint would be followed inside, and be gone.
        modules: Any = (math, torch.utils.checkpoint)
        super().__init__(autowrap_modules=modules)
        self._surroundings = _surroundings()

    def is_leaf_module(self, *_: Any) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, nn.Sequential) and m not in (self.submodule_paths or ()):
            return forward(*args, **kwargs)  # A slice, made on the way.
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise fx.proxy.TraceError("it switches gradients or autocast, or has its own backward")
        return super().create_node(*args, **kwargs)


def _surroundings() -> tuple[Any, ...]:
    """Return what holds for all operations; inside an `autograd.Function` gradients are off."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
    )


@contextlib.contextmanager
def _unchanged_randomness() -> Iterator[None]:
    """Refuse code that draws random numbers by itself, and take the draws back."""
    with generators_kept():
        before = _generators()
        yield
        drawn = not all(map(_equal_states, _generators(), before))
    if drawn:
        raise fx.proxy.TraceError("it draws random numbers in Python")


def _generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(_equal_states, one, other))
    return bool(np.array_equal(one, other))


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute, and a shallow copy of those that can change without being set."""
    return {
        name: (value, copy.copy(value) if type(value) in (dict, list, set) else None)
        for name, value in attributes.items()
        if name != "training"
    }


def _same(now: dict[str, tuple[Any, Any]], before: dict[str, tuple[Any, Any]]) -> bool:
    return now.keys() == before.keys() and all(
        now[name][0] is value and _parts(now[name][1]) == _parts(content)
        for name, (value, content) in before.items()
    )


def _parts(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [(id(key), id(value)) for key, value in content.items()]
    return sorted(map(id, content)) if isinstance(content, set) else list(map(id, content or ()))


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - before.keys() - {"training"}:
        del attributes[name]
    for name, (value, content) in before.items():
        attributes[name] = value
        if isinstance(content, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)


def same_steps(one: fx.Graph, other: fx.Graph) -> bool:
    """Tell whether two graphs do the same, step by step."""
    return _steps(one) == _steps(other)


def _steps(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes]


def _methods(cls: type) -> dict[str, types.CodeType]:
    """Return the code of the methods and properties that users wrote."""
    methods = {}
    for each in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        for name, value in vars(each).items():
            function = inspect.unwrap(getattr(value, "fget", value) or value)
            if isinstance(function, types.FunctionType):
                methods[name] = function.__code__
    return methods


def public_methods(cls: type) -> list[str]:
    """Return the names of methods and properties by which others call on a module's insides."""
    return [
        name
        for name in _methods(cls)
        if name != "forward" and not name.startswith("_") and not hasattr(nn.Module, name)
    ]


def names_read(cls: type, method: str) -> set[str]:
    """Return the names of attributes and globals in a method and in the methods that it names.

    The forward pass is not followed, but from itself.

    >>> class Net(nn.Module):
    ...     def forward(self, x):
    ...         return self.features(x)
    ...     def features(self, x):
    ...         return self.conv(x)
    >>> sorted(names_read(Net, "forward"))
    ['conv', 'features']
    """
    methods, names, todo = _methods(cls), set[str](), [method]
    while todo:
        codes = [methods[name]] if (name := todo.pop()) in methods else []
        while codes:
            code = codes.pop()
            new = set(code.co_names) - names
            names |= new
            todo += new - {"forward"}
            codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return names


class _Import(NamedTuple):
    """A module of Python among the globals of a forward pass, which by itself pickles not."""

    name: str


def rewrite(module: nn.Module, graph: fx.Graph) -> None:
    """Make a graph the forward pass of a module, in place; all else about the module stays.

    Its class becomes a subclass of what it was, which pickles. Plain attributes that the old code
    read are part of the graph, so that setting one to another value is refused.
    """
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        return
    for node in graph.nodes:
        node.type = None  # Annotations may be strings that mean nothing here.
    code = graph.python_code("self")
    scope = {
        name: _Import(value.__name__) if isinstance(value, types.ModuleType) else value
        for name, value in code.globals.items()
    }
    fixed = {name for name in vars(module) if not name.startswith("_")} - {"training"}
    fixed &= names_read(type(module), "forward")
    module.__class__ = _subclass(type(module), code.src, scope, sorted(fixed))


_BEFORE = "_before_rewriting"


def before_rewriting(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class that a module had before `rewrite`; None if it was not rewritten."""
    return vars(cls).get(_BEFORE)


def _subclass(
    base: type[nn.Module], source: str, scope: dict[str, Any], fixed: list[str]
) -> type[nn.Module]:
    namespace = {
        name: importlib.import_module(value.name) if isinstance(value, _Import) else value
        for name, value in scope.items()
    }
    where = f"<forward of {base.__qualname__}, rewritten by normlab>"
    exec(compile(source, where, "exec"), namespace)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        made = object.__reduce_ex__(self, protocol)
        assert isinstance(made, tuple)
        return (_new, (base, source, scope, fixed), *made[2:])

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name in fixed and name in vars(self) and not _equal(vars(self)[name], value):
            raise InputError(
                f"{name} = {vars(self)[name]!r} is part of the forward pass of "
                f"{base.__name__} since it was converted, and cannot become {value!r}: set it "
                "before, or convert with fuse=False"
            )
        base.__setattr__(self, name, value)

    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "__setattr__": set_attribute,
        _BEFORE: base,
        "forward": namespace["forward"],
    }
    return types.new_class(base.__name__, (base,), {}, lambda body: body.update(attributes))


def _equal(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and isinstance(old, _PLAIN) and old == new)


_PLAIN = (bool, int, float, str)


def _new(*arguments: Any) -> nn.Module:
    cls = _subclass(*arguments)
    return cls.__new__(cls)
