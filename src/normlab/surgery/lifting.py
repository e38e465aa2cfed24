"""Functional batch norms, and the functional layers before them, made into modules.

`F.batch_norm(F.conv2d(x, self.w), self.mean, self.var)` does what two modules would do. Where a
graph tells all of the forward pass that holds the calls, modules take their place, with the very
tensors, so that what is done to modules can be done to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from normlab.surgery.tracing import names_read, public_methods, rewrite, same_steps, trace

__all__ = ["Lifted", "lift"]

_OPTIONS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[Any, tuple[Any, tuple[str, ...]]] = {
    F.linear: (nn.Linear, ()),
    F.conv1d: (nn.Conv1d, _OPTIONS),
    F.conv2d: (nn.Conv2d, _OPTIONS),
    F.conv3d: (nn.Conv3d, _OPTIONS),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED_OPTIONS),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED_OPTIONS),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED_OPTIONS),
}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Lifted(NamedTuple):
    """What became of functional batch norms.

    Attributes:
        norms: Names of the modules that are new.
        refused: By the name of a module with batch norms that stay calls, why the first does.
    """

    norms: list[str]
    refused: dict[str, str]


def lift(model: nn.Module, owners: Collection[str], only: Collection[str] | None = None) -> Lifted:
    """Make a model's functional batch norms into modules, in place.

    Args:
        model: Whose forward passes are rewritten where that is possible.
        owners: Names of the modules in whose forward passes the calls are.
        only: Names of the modules to make, as an earlier call on a copy gave them; None for all.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(2, 2)
    ...         self.register_buffer("mean", torch.zeros(2))
    ...         self.register_buffer("var", torch.ones(2))
    ...     def forward(self, x):
    ...         return F.batch_norm(self.linear(x), self.mean, self.var)
    >>> net = Net()
    >>> lift(net, [""]).norms, list(net.state_dict())[2:4]
    (['batch_norm0'], ['batch_norm0.running_mean', 'batch_norm0.running_var'])
    """
    lifted = Lifted([], {})
    for name in owners:
        module = model.get_submodule(name)
        cls = type(module)
        found = trace(module)
        if not found.graphs:
            lifted.refused[name] = f"the forward of {cls.__name__} {found.reason}"
            continue
        _lift_in(module, f"{name}." if name else "", found.graphs, only, lifted)
    return lifted


class _RefusedError(Exception):
    """A call stays a call, for this reason."""


def _lift_in(
    owner: nn.Module, prefix: str, graphs: list[fx.Graph], only: Any, lifted: Lifted
) -> None:
    place = prefix.rstrip(".")
    forward = f"the forward of {type(owner).__name__}"
    training, evaluation = (
        [(node, _source(node)) for node in graph.nodes if node.target is F.batch_norm]
        for graph in graphs
    )
    if [each[1].target for each in training] != [each[1].target for each in evaluation]:
        lifted.refused[place] = f"{forward} depends on the mode"
        return
    made: dict[str, nn.Module] = {}
    names = []
    gone: list[str] = []
    for index, calls in enumerate(zip(training, evaluation, strict=True)):
        name = _free_name(owner, f"batch_norm{index}")
        if only is not None and prefix + name not in only:
            continue
        try:
            layer, norm, read = _modules(owner, *calls[1])
        except _RefusedError as error:
            lifted.refused.setdefault(place, str(error))
            continue
        for node, source in calls:
            if layer is not None:
                layer_name = _free_name(owner, f"layer{index}")
                made[layer_name] = layer
                _replace(source, layer_name)
            _replace(node, name)
        made[name] = norm
        names.append(prefix + name)
        gone += read
    if not names:
        return
    if not same_steps(*graphs):
        lifted.refused.setdefault(place, f"{forward} depends on the mode")
        return
    for key in gone:
        delattr(owner, key)
    for name, module in made.items():
        owner.add_module(name, module.train(owner.training))
    graphs[0].lint()
    rewrite(owner, graphs[0])
    lifted.norms.extend(names)


def _source(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _modules(
    owner: nn.Module, node: fx.Node, source: Any
) -> tuple[nn.Module | None, _BatchNorm, list[str]]:
    """Return modules for a batch norm and the call before it, and the attributes that they take."""
    bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    if len(source.users) != 1:
        raise _RefusedError("its input is also read elsewhere")
    if bound.arguments["training"] is not False:
        raise _RefusedError("it normalizes by the batch in evaluation too")
    names = {
        key: _attribute(owner, node, bound.arguments[key])
        for key in ("running_mean", "running_var", "weight", "bias")
    }
    layer, read = None, list(filter(None, names.values()))
    if len(set(read)) < len(read):
        raise _RefusedError("it reads one tensor twice")
    if source.op == "call_module":
        found: Any = owner.get_submodule(str(source.target))
        if not isinstance(found, (_ConvNd, nn.Linear)):
            raise _RefusedError("no convolution or linear layer makes its input")
    elif source.target in _LAYERS:
        layer, more = _layer(owner, source)
        read, found = read + more, layer
    else:
        raise _RefusedError("no convolution or linear layer makes its input")
    values: dict[str, Any] = {
        key: None if name is None else getattr(owner, name) for key, name in names.items()
    }
    for key in ("weight", "bias"):
        if values[key] is not None and not isinstance(values[key], nn.Parameter):
            raise _RefusedError(f"its {key} is no parameter")
    features, eps = len(values["running_mean"]), bound.arguments["eps"]
    norm = _NORMS[found.weight.ndim](features, eps, device="meta")
    for key, value in values.items():
        setattr(norm, key, value)
    return layer, norm, read


def _layer(owner: nn.Module, node: fx.Node) -> tuple[nn.Module, list[str]]:
    """Return the module for a functional layer, and the attributes that it takes."""
    cls, options = _LAYERS[node.target]
    given = dict(zip(("input", "weight", "bias", *options), node.args, strict=False)) | node.kwargs
    given.pop("input")
    names = [_attribute(owner, node, given.pop(key, None)) for key in ("weight", "bias")]
    tensors: list[Any] = [None if name is None else getattr(owner, name) for name in names]
    weight, bias = tensors
    if type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        raise _RefusedError("the weight or bias of the layer before it is no parameter")
    outputs, inputs, *kernel = weight.shape
    groups: Any = given.get("groups", 1)
    if "output_padding" in options:
        outputs, inputs = inputs * groups, outputs
    else:
        inputs = inputs * groups
    sizes = (inputs, outputs, tuple(kernel)) if kernel else (inputs, outputs)
    layer = cls(*sizes, device="meta", **given)
    layer.weight, layer.bias = weight, bias
    return layer, [name for name in names if name is not None]


def _attribute(owner: nn.Module, reader: fx.Node, value: Any) -> str | None:
    """Return the name of an owner's tensor that one step alone reads."""
    if value is None:
        return None
    if not isinstance(value, fx.Node) or value.op != "get_attr" or "." in str(value.target):
        raise _RefusedError("its tensors are computed, or belong to another module")
    name = str(value.target)
    readers = {user for node in reader.graph.nodes if node.target == name for user in node.users}
    methods = [
        each for each in public_methods(type(owner)) if name in names_read(type(owner), each)
    ]
    if readers != {reader} or methods:
        raise _RefusedError(f"{name} is also read elsewhere")
    return name


def _replace(node: fx.Node, name: str) -> None:
    """Put the call of a module in the place of a functional call."""
    graph = node.graph
    tensors = [each for each in node.all_input_nodes if each.op == "get_attr"]
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_module(name, (_source(node),)))
    graph.erase_node(node)
    for each in tensors:  # Which nothing else reads.
        graph.erase_node(each)


def _free_name(owner: nn.Module, name: str) -> str:
    return name if not hasattr(owner, name) else _free_name(owner, f"{name}_")
