"""A traced pass as a list of instructions that the kernels run.

Replaying a trace costs some microseconds an operation, and compiling it half a minute. The passes
of multilayer perceptrons, whose tensors are small, consist of few kinds of operations; for these
there are kernels (`kernels/steps.cpp`), and between them nothing is left to do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from normlab.kernels import ACTIVATIONS, BUILT
from normlab.training.steps import OPERATIONS, Instruction, NotLoweredError, Steps

__all__ = ["lower"]

aten = torch.ops.aten


class _Value(NamedTuple):
    """Where a tensor of the graph is.

    Attributes:
        place: Of its pointer.
        shape: As the graph has it.
        dtype: The same.
        turned: It lies in memory transposed.
    """

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def lower(graph: fx.Graph, tensors: Sequence[Tensor]) -> Steps:
    """Return the pass of one replica as instructions.

    Args:
        graph: Of operations of aten, whose nodes know their shapes.
        tensors: Examples of its arguments, laid out as all of them will be.

    Raises:
        NotLoweredError: There is no kernel for something in it.
    """
    if not BUILT:
        raise NotLoweredError("the kernels are not built")
    return _Lowering(graph, tensors).steps()


class _Opaque(NamedTuple):
    """What a kernel keeps for its backward pass, in a form of its own."""

    value: _Value


class _Lowering:
    """Goes through a graph and writes down what its nodes do."""

    def __init__(self, graph: fx.Graph, tensors: Sequence[Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.dtype = next(each.dtype for each in tensors if each.is_floating_point())
        self.instructions: list[Instruction] = []
        self.work: list[Tensor] = []
        self.values: dict[fx.Node, Any] = {}
        self.labels: dict[int, Tensor] = {}
        """All of those that a value is gathered from, by its place."""

    def steps(self) -> Steps:
        """Return what was written down."""
        places = iter(range(len(self.tensors)))
        for node in self.graph.nodes:
            if node in self.values:
                continue  # Done along with one before it.
            if node.op == "placeholder":
                self.values[node] = self._argument(next(places))
            elif node.op == "call_function":
                self.values[node] = self._call(node)
        outputs = [self.value(each) for each in next(reversed(self.graph.nodes)).args[0]]
        if any(each.place < len(self.tensors) for each in outputs):
            raise NotLoweredError("an argument is handed back")
        made = [
            (each.place, self.work[each.place - len(self.tensors)].view(each.shape))
            for each in outputs
        ]
        return Steps(self.instructions, self.work, made, self.dtype)

    def _call(self, node: fx.Node) -> Any:
        if node.target not in _LOWERED:
            raise NotLoweredError(f"there is no kernel for {node.target}")
        if node.kwargs and node.target not in _WITH_OPTIONS:
            raise NotLoweredError(f"there is no kernel for {node} with {node.kwargs}")
        try:
            made = _LOWERED[node.target](self, node, *node.args)
        except (KeyError, TypeError, ValueError) as error:  # Arguments of another kind or number.
            raise NotLoweredError(f"there is no kernel for {node.format_node()}") from error
        if isinstance(made, _Value) and node.target != aten.index.Tensor:
            wanted = node.meta["val"]
            if (made.shape, made.dtype) != (tuple(wanted.shape), wanted.dtype):
                raise NotLoweredError(f"there is no kernel for {node.format_node()}")
        return made

    def _argument(self, place: int) -> _Value:
        tensor = self.tensors[place]
        if not tensor.is_contiguous():
            raise NotLoweredError(f"argument {place} does not lie in memory in rows")
        return _Value(place, tuple(tensor.shape), tensor.dtype)

    def value(
        self,
        node: Any,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        *,
        turned: bool = False,
    ) -> _Value:
        """Return the value of a node.

        Args:
            node: Which.
            shape: What it must be, if given.
            dtype: The same; the network's if not given.
            turned: Whether it may lie in memory transposed.
        """
        value = self.values[node]
        if not isinstance(value, _Value) or (value.turned and not turned):
            raise NotLoweredError(f"{node} does not lie in memory in rows")
        if value.dtype != (dtype or self.dtype) or (
            shape is not None and value.shape != tuple(shape)
        ):
            raise NotLoweredError(f"{node} is {value.dtype} of shape {value.shape}")
        return value

    def optional(self, node: Any, *shape: int) -> _Value | None:
        """Return the value of a node that may be missing."""
        return None if node is None else self.value(node, shape)

    def kept(self, node: Any) -> _Value:
        """Return what a kernel kept for its backward pass."""
        opaque = self.values[node]
        if not isinstance(opaque, _Opaque):
            raise NotLoweredError(f"{node} was not kept by a kernel")
        return opaque.value

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> _Value:
        """Return a new value, zero for now."""
        return self.place(torch.zeros(shape, dtype=dtype or self.dtype))

    def place(self, tensor: Tensor) -> _Value:
        """Return a value that lies in a tensor's memory."""
        self.work.append(tensor)
        place = len(self.tensors) + len(self.work) - 1
        return _Value(place, tuple(tensor.shape), tensor.dtype)

    def write(
        self,
        operation: str,
        operands: Sequence[_Value | None],
        sizes: Sequence[int],
        numbers: Sequence[float] = (),
    ) -> None:
        """Add an instruction."""
        instruction = Instruction(OPERATIONS.index(operation))
        for i, each in enumerate(operands):
            instruction.operands[i] = -1 if each is None else each.place
        instruction.sizes[: len(sizes)] = sizes
        instruction.numbers[: len(numbers)] = numbers
        self.instructions.append(instruction)


# Of each operation: what is to be written down, and where its result is. Functions of the lowering,
# the node, and the node's arguments.


def _gather(low: _Lowering, node: fx.Node, source: Any, indices: Any) -> _Value:
    rows = low.values[source]
    (at,) = (low.value(each, dtype=torch.int64) for each in indices)
    if rows.place > 1 or at.place != len(low.tensors) - 1:
        raise NotLoweredError(f"there is no kernel for {node}: only the data are gathered")
    if rows.dtype == torch.int64 and len(rows.shape) == len(at.shape) == 1:
        labels = low.make(*at.shape, dtype=torch.int64)
        low.labels[labels.place] = low.tensors[rows.place]
        low.write("labels", [rows, at, labels], at.shape)
        return labels
    if rows.dtype != torch.uint8 or len(at.shape) != 1:
        raise NotLoweredError(f"there is no kernel for {node} of {rows.dtype}")
    # What follows makes numbers of the bytes and scales them: it is done along with this.
    factor, offset, chain = 1.0, 0.0, [node]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        number: Any = user.args[1] if len(user.args) == 2 else None
        converts = user.target is aten._to_copy.default and set(user.kwargs) == {"dtype"}
        scales = isinstance(number, float) and not user.kwargs
        if user.target is aten.mul_.Tensor and scales and not offset:
            factor *= number
        elif user.target is aten.add_.Tensor and scales:
            offset += number
        elif not converts or user.kwargs["dtype"] not in (torch.float32, low.dtype):
            break
        chain.append(user)
    images = low.make(at.shape[0], *rows.shape[1:])
    if chain[-1].meta["val"].dtype != low.dtype:
        raise NotLoweredError("the images do not become numbers of the network's type")
    sizes = [at.shape[0], math.prod(rows.shape[1:])]
    low.write("gather", [rows, at, images], sizes, [factor, offset])
    low.values |= dict.fromkeys(chain, images)
    return images


def _narrow(low: _Lowering, node: fx.Node, source: Any) -> _Value:
    value = low.value(source, dtype=torch.float64)
    if node.kwargs != {"dtype": low.dtype}:
        raise NotLoweredError(f"there is no kernel for {node}")
    narrow = low.make(*value.shape)
    low.write("narrow", [value, narrow], [value.numel])
    return narrow


def _reshape(low: _Lowering, node: fx.Node, source: Any, *_: Any) -> _Value:
    """Return a value in another shape."""
    value, shape = low.value(source), tuple(node.meta["val"].shape)
    if math.prod(shape) != value.numel:
        raise NotLoweredError(f"there is no kernel for {node} of shape {value.shape}")
    return value._replace(shape=shape)


def _transpose(low: _Lowering, node: fx.Node, source: Any) -> _Value:
    value = low.value(source, turned=True)
    return value._replace(shape=tuple(node.meta["val"].shape), turned=not value.turned)


def _one(low: _Lowering, node: fx.Node, *_: Any) -> _Value:
    if node.meta["val"].shape:
        raise NotLoweredError(f"there is no kernel for {node}")
    return low.place(torch.ones((), dtype=low.dtype))


def _product(low: _Lowering, node: fx.Node, *operands: Any) -> _Value:
    del node
    *bias, a, b = operands
    left, right = low.value(a, turned=True), low.value(b, turned=True)
    (m, k), (_, n) = left.shape, right.shape
    added = low.value(bias[0], [n]) if bias else None
    out = low.make(m, n)
    low.write("product", [added, left, right, out], [m, n, k, left.turned + 2 * right.turned])
    return out


def _sum(low: _Lowering, node: fx.Node, source: Any, dims: Any, *_: Any) -> _Value:
    value = low.value(source)
    if len(value.shape) != 2 or list(dims) != [0]:
        raise NotLoweredError(f"there is no kernel for {node} along {dims}")
    out = low.make(*node.meta["val"].shape)
    low.write("column sums", [value, out], value.shape)
    return out


def _sum_of_all(low: _Lowering, node: fx.Node, source: Any) -> _Value:
    del node
    value, out = low.value(source), low.make()
    low.write("column sums", [value, out], [value.numel, 1])
    return out


def _stock_batch_norm(
    low: _Lowering, node: fx.Node, x: Any, w: Any, b: Any, mean: Any, var: Any, *options: Any
) -> Any:
    training, momentum, eps = options
    if not training:
        raise NotLoweredError(f"{node} does not use the batch's statistics")
    out, statistics = _batch_norm(low, x, w, b, [mean, var], [momentum, eps])
    return out, _Opaque(statistics), _Opaque(statistics)


def _own_batch_norm(
    low: _Lowering, node: fx.Node, x: Any, residual: Any, w: Any, b: Any, *options: Any
) -> Any:
    _, _, eps, activation, slope, training, replicas = options
    if residual is not None or not training or replicas != 1:
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    return _batch_norm(low, x, w, b, [None, None], [0.0, eps, slope], ACTIVATIONS[activation])


def _batch_norm(
    low: _Lowering,
    x: Any,
    w: Any,
    b: Any,
    running: Sequence[Any],
    numbers: Sequence[float],
    activation: int = 0,
) -> tuple[_Value, _Value]:
    value = low.value(x)
    samples, channels = _matrix(value)
    moved = [low.optional(each, channels) for each in (w, b, *running)]
    out = low.make(samples, channels)
    statistics = low.make(2, channels, dtype=torch.float64)
    sizes = [samples, channels, activation]
    low.write("batch norm", [value, *moved, out, statistics], sizes, numbers)
    return out, statistics


def _stock_batch_norm_backward(
    low: _Lowering, node: fx.Node, grad: Any, x: Any, w: Any, *rest: Any
) -> Any:
    *_, statistics, _, training, eps, _ = rest
    if not training:
        raise NotLoweredError(f"{node} does not use the batch's statistics")
    return _batch_norm_backward(low, grad, x, w, None, low.kept(statistics), [0.0, eps])


def _own_batch_norm_backward(
    low: _Lowering, node: fx.Node, grad: Any, x: Any, y: Any, w: Any, b: Any, *rest: Any
) -> Any:
    statistics, eps, activation, slope, training, replicas, _ = rest
    if y is not None or not training or replicas != 1:
        raise NotLoweredError(f"there is no kernel for {node} with {rest}")
    kept = low.value(statistics, dtype=torch.float64)
    numbers, number = [0.0, eps, slope], ACTIVATIONS[activation]
    by_x, by_w, by_b = _batch_norm_backward(low, grad, x, w, b, kept, numbers, number)
    return by_x, None, by_w, by_b


def _batch_norm_backward(
    low: _Lowering,
    grad: Any,
    x: Any,
    w: Any,
    b: Any,
    statistics: _Value,
    numbers: Sequence[float],
    activation: int = 0,
) -> tuple[_Value, _Value, _Value]:
    value = low.value(x)
    samples, channels = _matrix(value)
    by_x, by_w, by_b = low.make(samples, channels), low.make(channels), low.make(channels)
    weight, bias = low.optional(w, channels), low.optional(b, channels)
    operands = [low.value(grad, value.shape), value, weight, bias, statistics, by_x, by_w, by_b]
    low.write("batch norm backward", operands, [samples, channels, activation], numbers)
    return by_x, by_w, by_b


def _layer_norm(
    low: _Lowering, node: fx.Node, x: Any, shape: Any, w: Any, b: Any, eps: float
) -> Any:
    del node
    if list(shape) != [_matrix(low.value(x))[1]]:
        raise NotLoweredError(f"there is no kernel that normalizes over {shape}")
    return _groups(low, x, w, b, 1, eps)


def _group_norm(low: _Lowering, node: fx.Node, x: Any, w: Any, b: Any, *options: Any) -> Any:
    del node
    *_, groups, eps = options
    return _groups(low, x, w, b, groups, eps)


def _groups(low: _Lowering, x: Any, w: Any, b: Any, groups: int, eps: float) -> Any:
    value = low.value(x)
    samples, channels = _matrix(value)
    out, statistics = low.make(samples, channels), low.make(2, samples * groups)
    operands = [value, low.optional(w, channels), low.optional(b, channels), out, statistics]
    low.write("group norm", operands, [samples, channels, groups], [0.0, eps])
    return out, _Opaque(statistics), _Opaque(statistics)


def _layer_norm_backward(low: _Lowering, node: fx.Node, grad: Any, x: Any, *rest: Any) -> Any:
    del node
    _, statistics, _, w, *_ = rest
    return _groups_backward(low, grad, x, statistics, w, 1)


def _group_norm_backward(low: _Lowering, node: fx.Node, grad: Any, x: Any, *rest: Any) -> Any:
    del node
    statistics, _, w, *_, groups, _ = rest
    return _groups_backward(low, grad, x, statistics, w, groups)


def _groups_backward(
    low: _Lowering, grad: Any, x: Any, statistics: Any, w: Any, groups: int
) -> tuple[_Value, _Value, _Value]:
    value = low.value(x)
    samples, channels = _matrix(value)
    by_x, by_w, by_b = low.make(samples, channels), low.make(channels), low.make(channels)
    kept, weight = low.kept(statistics), low.optional(w, channels)
    operands = [low.value(grad, value.shape), value, weight, kept, by_x, by_w, by_b]
    low.write("group norm backward", operands, [samples, channels, groups])
    return by_x, by_w, by_b


def _matrix(value: _Value) -> tuple[int, int]:
    if len(value.shape) != 2:
        raise NotLoweredError(f"there is no kernel that normalizes shape {value.shape}")
    rows, columns = value.shape
    return rows, columns


def _elementwise(
    operation: str, tensors: int, takes: Callable[..., bool] = lambda *numbers: not numbers
) -> Callable[..., _Value]:
    """Return what is done for an operation on tensors of one shape, and then the numbers it takes.

    The kernel is given the first of these.
    """

    def write(low: _Lowering, node: fx.Node, *arguments: Any) -> _Value:
        operands, numbers = arguments[:tensors], arguments[tensors:]
        if not takes(*numbers):
            raise NotLoweredError(f"there is no kernel for {node} with {arguments}")
        first = low.value(operands[0])
        values = [low.value(each, first.shape) for each in operands]
        out = low.make(*first.shape)
        low.write(operation, [*values, out], [first.numel], [float(each) for each in numbers[:1]])
        return out

    return write


def _leaky_relu(low: _Lowering, node: fx.Node, x: Any, slope: float = 0.01) -> _Value:
    return _elementwise("leaky relu", 1, lambda _: True)(low, node, x, slope)


def _multiply(low: _Lowering, node: fx.Node, a: Any, b: Any) -> _Value:
    if isinstance(b, fx.Node):
        return _elementwise("multiply", 2)(low, node, a, b)
    value = low.value(a, dtype=torch.float64)
    out = low.make(*value.shape, dtype=torch.float64)
    low.write("scale", [value, out], [value.numel], [b])
    return out


def _count(low: _Lowering, node: fx.Node, counter: Any, by: Any) -> _Value:
    value = low.value(counter, dtype=torch.int64)
    if by != 1 or value.numel != 1:
        raise NotLoweredError(f"there is no kernel for {node}")
    low.write("count", [value], [])
    return value


def _copy(low: _Lowering, node: fx.Node, target: Any, source: Any) -> _Value:
    del node
    to = low.value(target)
    low.write("copy", [low.value(source, to.shape), to], [to.numel])
    return to


def _unbind(low: _Lowering, node: fx.Node, source: Any) -> tuple[_Value, ...]:
    """Take the rows of one of our own values apart."""
    value = low.value(source, dtype=node.meta["val"][0].dtype)
    if value.place < len(low.tensors):
        raise NotLoweredError(f"there is no kernel for {node}")
    tensor = low.work[value.place - len(low.tensors)].view(value.shape)
    return tuple(low.place(row) for row in tensor)


def _log_softmax(low: _Lowering, node: fx.Node, x: Any, dim: int, _: bool) -> _Value:
    value = low.value(x)
    if len(value.shape) != 2 or dim not in (1, -1):
        raise NotLoweredError(f"there is no kernel for {node} along {dim}")
    out = low.make(*value.shape)
    low.write("log softmax", [value, out], value.shape)
    return out


def _log_softmax_backward(low: _Lowering, node: fx.Node, grad: Any, y: Any, *_: Any) -> _Value:
    del node
    value = low.value(y)
    out = low.make(*value.shape)
    low.write("log softmax backward", [low.value(grad, value.shape), value, out], value.shape)
    return out


def _nll(low: _Lowering, node: fx.Node, x: Any, y: Any, *options: Any) -> Any:
    value, out = low.value(x), low.make()
    labels = low.value(y, dtype=torch.int64)
    if len(value.shape) != 2 or options[:2] != (None, 1) or labels.place not in low.labels:
        raise NotLoweredError(f"there is no kernel for {node} with {options}")
    least, most = low.labels[labels.place].aminmax()
    if not 0 <= int(least) <= int(most) < value.shape[1]:
        raise NotLoweredError(f"labels reach from {least} to {most}, of {value.shape[1]} classes")
    low.write("nll", [value, labels, out], value.shape)
    return out, None


def _nll_backward(low: _Lowering, node: fx.Node, grad: Any, x: Any, y: Any, *_: Any) -> _Value:
    del node
    value = low.value(x)
    out = low.make(*value.shape)
    operands = [low.value(grad), low.value(y, dtype=torch.int64), out]
    low.write("nll backward", operands, value.shape)
    return out


_LOWERED: dict[Any, Callable[..., Any]] = {
    operator.getitem: lambda low, _, source, i: low.values[source][i],
    aten.index.Tensor: _gather,
    aten._to_copy.default: _narrow,
    aten.view.default: _reshape,
    aten.expand.default: _reshape,
    aten.sum.default: _sum_of_all,
    aten.t.default: _transpose,
    aten.ones_like.default: _one,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.sum.dim_IntList: _sum,
    aten.native_batch_norm.default: _stock_batch_norm,
    aten.native_batch_norm_backward.default: _stock_batch_norm_backward,
    torch.ops.normlab.batch_norm.default: _own_batch_norm,
    torch.ops.normlab.batch_norm_backward.default: _own_batch_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.relu.default: _elementwise("relu", 1),
    aten.threshold_backward.default: _elementwise(
        "relu backward", 2, lambda threshold: threshold == 0
    ),
    aten.leaky_relu.default: _leaky_relu,
    aten.leaky_relu_backward.default: _elementwise(
        "leaky relu backward", 2, lambda slope, _: slope > 0
    ),
    aten.sigmoid.default: _elementwise("sigmoid", 1),
    aten.sigmoid_backward.default: _elementwise("sigmoid backward", 2),
    aten.tanh.default: _elementwise("tanh", 1),
    aten.tanh_backward.default: _elementwise("tanh backward", 2),
    aten.silu.default: _elementwise("silu", 1),
    aten.silu_backward.default: _elementwise("silu backward", 2),
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _elementwise("add", 2),
    aten.add_.Tensor: _count,
    aten.lerp.Scalar: _elementwise("lerp", 2, lambda _: True),
    aten.copy_.default: _copy,
    aten.unbind.int: _unbind,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
}

_WITH_OPTIONS = {aten._to_copy.default, aten.ones_like.default}
"""Operations whose named arguments are looked at, or of no consequence."""
