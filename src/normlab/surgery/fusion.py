"""What follows batch norm layers, taken out of a model so that the layers do it themselves.

A step is taken out where nothing else reads the value before it: in an `nn.Sequential` that is
seen from the order, elsewhere from the graph of the forward pass that calls the layer.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from normlab.surgery.tracing import Trace, in_place, names_read, public_methods, rewrite, trace
from normlab.surgery.unfusing import mark

__all__ = ["Follow", "Fused", "fuse"]


class Follow(NamedTuple):
    """What a layer does itself after normalizing: add if `added`, then activate."""

    activation: str
    negative_slope: float = 0.01
    added: bool = False


class Fused(NamedTuple):
    """What became of the layers and their model.

    Attributes:
        follows: By layer, for those that do more now.
        reasons: By layer, why the others do not.
        rewritten: The modules whose forward pass is another now, with the class that they had.
    """

    follows: dict[nn.Module, Follow]
    reasons: dict[nn.Module, str]
    rewritten: dict[nn.Module, str]


def fuse(model: nn.Module, layers: Collection[nn.Module]) -> Fused:
    """Take out of a model, in place, what its batch norm layers can do, and say what that is.

    The layers themselves are left as they are.

    >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    >>> fuse(model, [model[0]]).follows
    {BatchNorm1d(3, ...): Follow(activation='relu', negative_slope=0.01, added=False)}
    >>> model[1]
    Identity()
    """
    surgeon = _Surgeon(model, layers)
    for module in list(model.modules()):
        if _is_sequence(module):
            surgeon.operate_on_sequence(module)
    for module in surgeon.traces:
        surgeon.operate_on_graph(module)
    return surgeon.fused


_NOTHING_FOLLOWS = "no activation follows it"
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}
_CALLS: dict[Any, str] = {
    **dict.fromkeys([F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"], "relu"),
    **dict.fromkeys([F.leaky_relu, F.leaky_relu_], "leaky_relu"),
    **dict.fromkeys(
        [F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit, "sigmoid", "sigmoid_"],
        "sigmoid",
    ),
    F.silu: "silu",
}
_ADDITIONS = (operator.add, torch.add, "add", "add_", in_place)
_ADDITIONS_IN_PLACE = (in_place, "add_")
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


class _RefusedError(Exception):
    """A layer stays as it is, for this reason."""


class _Surgeon:
    """Knows who calls what in a model."""

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self.fused = Fused({}, dict.fromkeys(layers, _NOTHING_FOLLOWS), {})
        self.names = {module: name for name, module in model.named_modules()}
        self.parents: dict[nn.Module, list[nn.Module]] = {module: [] for module in self.names}
        self.calls: Counter[nn.Module] = Counter()
        self.traces: dict[nn.Module, Trace] = {}
        self.unseen: dict[nn.Module, str] = {}
        for module in self.names:
            for child in module._modules.values():
                if child is not None:
                    self.parents[child].append(module)
            inside = any(each in self.fused.reasons for each in module.modules())
            if inside and self._is_custom(module):
                self._trace(module)

    def operate_on_sequence(self, sequence: nn.Module) -> None:
        children = [child for child in sequence._modules.values() if child is not None]
        for child, following in itertools.pairwise(children):
            chain = self._chain(child)
            with _Attempt(self.fused, chain[-1]) as attempt:
                if not attempt or type(following) not in _MODULES:
                    continue
                self._check(chain, 0)
                follow = _activation_module(following)
                if len(self.parents[following]) != 1 or self.calls[following]:
                    raise _RefusedError("the activation after it is used elsewhere too")
                mark(following, type(following))
                following.__class__ = nn.Identity  # What users hung on it stays.
                mark(chain[-1], "sequence")
                self.fused.follows[chain[-1]] = follow

    def operate_on_graph(self, owner: nn.Module) -> None:
        graphs, reason = self.traces[owner]
        if not graphs:
            return
        before = len(self.fused.follows)
        # From the end: of two layers that are added, the later one need not move.
        for node in reversed(list(graphs[0].nodes)):
            if node.op == "call_module":
                chain = self._chain(owner.get_submodule(node.target))
                with _Attempt(self.fused, chain[-1]) as attempt:
                    if not attempt:
                        continue
                    if reason:
                        raise _RefusedError(f"{self._forward_of(owner)} {reason}")
                    self.fused.follows[chain[-1]] = self._take(owner, node, chain)
                    mark(chain[-1], "graph")
        if len(self.fused.follows) > before:
            graphs[0].lint()
            self.fused.rewritten[owner] = type(owner).__name__
            rewrite(owner, graphs[0])

    def _take(self, owner: nn.Module, node: fx.Node, chain: list[nn.Module]) -> Follow:
        """Take the steps after a layer's out of the graph."""
        user = _reader(node)
        if _operands(user):
            return self._take_addition(owner, node, user, chain)
        follow = _activation(owner, user, node)
        self._check(chain, 1)
        self._check_methods(owner, node)
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
        return follow

    def _take_addition(
        self, owner: nn.Module, node: fx.Node, addition: fx.Node, chain: list[nn.Module]
    ) -> Follow:
        try:
            activation = _reader(addition)
            follow = _activation(owner, activation, addition)
        except _RefusedError as error:
            raise _RefusedError(f"an addition follows it, and then: {error}") from None
        operands = _operands(addition)
        others = [each for each in operands if each is not node]
        if follow.activation != "relu":
            raise _RefusedError("an addition follows it, but no ReLU after that")
        if len(others) != 1 or not isinstance(others[0], fx.Node) or addition.kwargs:
            raise _RefusedError("what is added to it is not one other tensor")
        residual, source = others[0], node.args[0] if len(node.args) == 1 else None
        if len(chain) > 1:
            raise _RefusedError("it ends an nn.Sequential, which takes nothing to be added")
        if chain[-1]._forward_pre_hooks:
            raise _RefusedError("it has hooks, which would not see what is added")
        if not isinstance(source, fx.Node) or node.kwargs:
            raise _RefusedError("it is not called with one tensor")
        in_place = addition.target in _ADDITIONS_IN_PLACE and operands[0] is residual
        if in_place and not _is_fresh(owner, residual):
            raise _RefusedError("it is added in place to a value that others may read")
        # The layer is called where the addition was: its input must be the same there.
        if node.next is not addition and not _is_fresh(owner, source):
            raise _RefusedError("its input may change before the addition")
        self._check(chain, 1)
        self._check_methods(owner, node)
        graph = node.graph
        with graph.inserting_before(addition):
            # Additions broadcast.
            expanded = graph.call_method("expand_as", (residual, source))
            moved = graph.call_module(str(node.target), (source, expanded))
        activation.replace_all_uses_with(moved)
        for old in (activation, addition, node):
            graph.erase_node(old)
        return follow._replace(added=True)

    def _check(self, chain: list[nn.Module], calls: int) -> None:
        """Refuse unless a layer, at the end of a chain of sequences, has one place in the model."""
        if chain[-1] in self.unseen:
            raise _RefusedError(self.unseen[chain[-1]])
        for module, allowed in zip(chain, [calls, *[0] * len(chain)], strict=False):
            what = "it" if module is chain[-1] else "the nn.Sequential that it ends"
            if _is_hooked(module):
                raise _RefusedError(f"{what} has hooks, which would see another value")
            if len(self.parents[module]) != 1:
                raise _RefusedError(f"{what} is shared by several places")
            if self.calls[module] != allowed or (allowed and _is_sequence(self.parents[module][0])):
                raise _RefusedError(f"{what} is called from several places")

    def _check_methods(self, owner: nn.Module, node: fx.Node) -> None:
        """Refuse to leave a public method behind that takes the layer for what it was."""
        name, cls = str(node.target).split(".")[0], type(owner)
        for method in public_methods(cls):
            if name in names_read(cls, method):
                raise _RefusedError(f"{cls.__name__}.{method} reads it too")

    def _trace(self, module: nn.Module) -> None:
        found = self.traces[module] = trace(module)
        counts: Counter[nn.Module] = Counter()
        for graph in found.graphs:
            calls: Counter[nn.Module] = Counter()
            for node in graph.nodes:
                if node.op == "call_module":
                    calls[module.get_submodule(node.target)] += 1
                elif node.op == "get_attr":
                    value = operator.attrgetter(node.target)(module)
                    if isinstance(value, nn.Module):
                        calls[value] += 2  # It is handed on, to be called who knows where.
            counts |= calls
        self.calls += counts
        if not found.graphs:
            reason = f"{self._forward_of(module)} {found.reason}"
            self.unseen |= dict.fromkeys(self._within(module), reason)
            self.fused.reasons.update(
                {each: reason for each in self._within(module) if each in self.fused.reasons}
            )

    def _within(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield what a forward pass may call, if custom modules are only called as a whole."""
        for child in module.children():
            yield child
            if not self._is_custom(child):
                yield from self._within(child)

    def _chain(self, module: nn.Module) -> list[nn.Module]:
        """Return a module and, while it is a sequence, the last one in it."""
        chain = [module]
        while _is_sequence(chain[-1]) and len(chain[-1]._modules):
            chain.append(list(chain[-1].children())[-1])
        return chain

    def _is_custom(self, module: nn.Module) -> bool:
        """Tell whether a module's forward pass is code that the user wrote."""
        if module in self.fused.reasons or _is_sequence(module):
            return False
        cls = type(module)
        ours = cls.__module__.split(".")[0] == "torch" and not isinstance(module, fx.GraphModule)
        return "forward" in vars(module) or not (ours or cls.forward is nn.Module.forward)

    def _forward_of(self, module: nn.Module) -> str:
        name = self.names[module]
        return f"the forward of {type(module).__name__}{name and f' {name!r}'}"


class _Attempt:
    """Notes why an attempt at a layer was refused; false if there is nothing to attempt."""

    def __init__(self, fused: Fused, layer: nn.Module) -> None:
        self.fused, self.layer = fused, layer

    def __enter__(self) -> bool:
        return self.layer in self.fused.reasons and self.layer not in self.fused.follows

    def __exit__(self, kind: Any, error: Any, _: Any) -> bool:
        # The first reason stays: that of the order in a sequence, or of an untraceable forward.
        if kind is _RefusedError and self.fused.reasons[self.layer] == _NOTHING_FOLLOWS:
            self.fused.reasons[self.layer] = str(error)
        return kind is _RefusedError


def _is_sequence(module: nn.Module) -> bool:
    ours = type(module).forward is nn.Sequential.forward
    return isinstance(module, nn.Sequential) and ours and "forward" not in vars(module)


def _is_hooked(module: nn.Module) -> bool:
    """Tell whether hooks see a module's output or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _is_fresh(owner: nn.Module, node: fx.Node) -> bool:
    """Tell whether a value is new memory that only one step reads."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    module = owner.get_submodule(str(node.target))
    return isinstance(module, _FRESH) and not module._forward_hooks


def _reader(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise _RefusedError("its output is read by several steps" if node.users else "is not used")
    (user,) = node.users
    return user


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """Return what an addition adds; nothing if it is another step."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return ()
    if node.target is in_place:
        return node.args[1:] if node.args[0] == "iadd" else ()
    return node.args


def _activation(owner: nn.Module, node: fx.Node, value: fx.Node) -> Follow:
    """Return what an activation step does to a value."""
    options = dict(node.kwargs)
    arguments = list(node.args) or [options.pop("input", None)]
    if node.op == "call_module" and arguments == [value] and not options:
        return _activation_module(owner.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method") or node.target not in _CALLS:
        raise _RefusedError(_NOTHING_FOLLOWS)
    name = _CALLS[node.target]
    names = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    options |= dict(zip(names, arguments[1:], strict=False))
    slope = options.pop("negative_slope", 0.01)
    options.pop("inplace", None)
    if arguments[0] is not value or options or not isinstance(slope, (int, float)):
        raise _RefusedError("the activation after it is called in a way of its own")
    return Follow(name, float(slope))


def _activation_module(module: nn.Module) -> Follow:
    if type(module) not in _MODULES or "forward" in vars(module):
        raise _RefusedError(_NOTHING_FOLLOWS)
    if _is_hooked(module) or module._forward_pre_hooks:
        raise _RefusedError("the activation after it has hooks, which would see another value")
    slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.01
    return Follow(_MODULES[type(module)], slope)
