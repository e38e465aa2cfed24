"""What layers do of what followed them, given back to the modules that did it before."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from normlab.surgery.tracing import before_rewriting

__all__ = ["mark", "unfuse"]

_MARK = "_fused_from"
_FUNCTIONS: dict[str, Any] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
}


def mark(module: nn.Module, what: Any) -> None:
    """Note how fusing changed a module: the class that an activation had, or who told a layer."""
    vars(module)[_MARK] = what


def unfuse(model: nn.Module) -> dict[nn.Module, str]:
    """Undo what `fusion.fuse` did to a model, in place.

    Returns:
        The modules that do again what they did, with their class.
    """
    restored: dict[nn.Module, str] = {}
    for module in list(model.modules()):
        cls = before_rewriting(type(module))
        if isinstance(module, fx.GraphModule):
            if _insert(module):
                restored[module] = type(module).__name__
        elif cls is not None:
            module.__class__ = cls
            restored[module] = cls.__name__
    for module in model.modules():
        what = vars(module).pop(_MARK, None)
        if isinstance(what, type):
            module.__class__ = what
            restored[module] = what.__name__
        elif what is not None:
            layer: Any = module
            layer.activation, layer.negative_slope = None, 0.01
    return restored


def _insert(module: fx.GraphModule) -> bool:
    """Put into a copy of a graph what layers took out of it, and the copy in its place."""
    changed, graph = False, copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        layer: Any = module.get_submodule(node.target) if node.op == "call_module" else None
        while isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[-1]
        if layer is None or vars(layer).get(_MARK) != "graph":
            continue
        changed, (_, *residual) = True, node.args
        users = list(node.users)
        with graph.inserting_after(node):
            last = node
            if residual:
                last = graph.call_method("add", (node, *residual))
                node.args = node.args[:1]
        with graph.inserting_after(last):
            slope = (layer.negative_slope,) if layer.activation == "leaky_relu" else ()
            last = graph.call_function(_FUNCTIONS[layer.activation], (last, *slope))
        for user in users:
            user.replace_input_with(node, last)
    if changed:
        module.graph = graph
    return changed
