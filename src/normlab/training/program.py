"""A network's forward and backward pass as a function of tensors alone, traced once.

A training step in eager torch spends most of its time in modules, autograd and the optimizer's
bookkeeping. A program has none of these: the operations of the pass are recorded once, for one
replica or for several stacked along a new first axis, and replayed, or compiled to machine code.
The module is called as it is and need not know.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from normlab.data import scale
from normlab.errors import InputError
from normlab.files import cache_folder
from normlab.layers import Dropout
from normlab.training.lowering import lower

__all__ = [
    "Pass",
    "are_close",
    "dropouts_of",
    "dropped",
    "gradient_strides",
    "make",
    "state_names",
]

aten = torch.ops.aten

Pass = Callable[[list[Tensor]], Sequence[Tensor]]
"""Takes a list of images, labels, parameters, buffers, dropout masks and indices; moves the
buffers; returns losses, gradients, and how many samples the logits got right. Images that are not
bytes are a batch as it is, whose labels must be ones that the network knows; their indices are not
looked at."""


class _Pass(nn.Module):
    """The pass of `width` replicas, to be traced.

    Gradients are laid out as their parameters are. Where the weights of a convolution have the
    channels last, torch's convolutions on a CPU take that way, in which their backward pass is
    twice as fast.
    """

    def __init__(self, network: nn.Module, width: int, scaling: str) -> None:
        super().__init__()
        self.network, self.width, self.scaling = (network,), width, scaling  # Not a submodule.
        self.parameter_names, self.buffer_names = state_names(network)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        losses, gradients, hits = self.run(*tensors)
        parameters = tensors[2 : 2 + len(gradients)]
        return [losses, *map(_laid_out, gradients, parameters), hits]

    def run(self, *tensors: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Return losses, gradients as autograd lays them out, and hits."""
        images, labels, *rest, indices = tensors
        split = len(self.parameter_names), len(self.parameter_names) + len(self.buffer_names)
        parameters = [each.detach().requires_grad_() for each in rest[: split[0]]]
        buffers, masks = rest[split[0] : split[1]], rest[split[1] :]
        if images.dtype == torch.uint8:
            x = scale(images[indices], self.scaling).to(parameters[0].dtype)
            y = labels[indices]
        else:
            x, y = images, labels  # A batch as it is.
        with torch.enable_grad():
            one = self._loss if self.width == 1 else vmap(self._loss)
            losses, hits = one(parameters, buffers, masks, x, y)
            # A parameter that the pass does not use has a gradient of zeros.
            gradients = torch.autograd.grad(
                losses.sum(), parameters, allow_unused=True, materialize_grads=True
            )
        return losses.detach(), gradients, hits

    def _loss(
        self,
        parameters: list[Tensor],
        buffers: list[Tensor],
        masks: list[Tensor],
        x: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (network,) = self.network
        state = dict(zip(self.parameter_names, parameters, strict=True))
        state |= dict(zip(self.buffer_names, buffers, strict=True))
        dropouts = dropouts_of(network)
        try:
            for dropout, mask in zip(dropouts, masks, strict=True):
                dropout.mask = mask
            logits = functional_call(network, state, (x,))
        finally:
            for dropout in dropouts:
                dropout.mask = None
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).sum()


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient as an optimizer's kernel wants it, which looks at the memory alone."""
    each = zip(gradient.stride(), parameter.stride(), parameter.shape, strict=True)
    if all(its == own for its, own, size in each if size > 1):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def gradient_strides(
    network: nn.Module, width: int, scaling: str, tensors: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    """Return the strides that autograd gives to each parameter's gradient; as `make` takes them."""
    _, gradients, _ = _Pass(network, width, scaling).run(*tensors)
    return [gradient.stride() for gradient in gradients]


def state_names(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of what is trained, and of what is not: frozen parameters, and buffers."""
    trained = [name for name, each in network.named_parameters() if each.requires_grad]
    frozen = [name for name, each in network.named_parameters() if not each.requires_grad]
    return trained, [*frozen, *(name for name, _ in network.named_buffers())]


_PRODUCTS = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
    *(aten.convolution.default, aten.convolution_backward.default),
}


class _InBfloat16(fx.Interpreter):
    """Runs a traced pass with its products of matrices and its convolutions in bfloat16.

    What they read is rounded; what they return goes on in the type that it had. Biases are added,
    and their gradients summed up, in that type too.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Do what a node says."""
        if target not in _PRODUCTS or not args[0].is_floating_point():
            return super().call_function(target, args, kwargs)
        if target in (aten.addmm.default, aten.baddbmm.default):
            bias, *factors = args
            product = aten.mm.default if target == aten.addmm.default else aten.bmm.default
            return bias + self.call_function(product, tuple(factors), kwargs)
        if target in (aten.mm.default, aten.bmm.default):
            return target(*map(_rounded, args), **kwargs).to(args[0].dtype)
        if target == aten.convolution.default:
            x, weight, bias, *options = args
            y = target(_rounded(x), _rounded(weight), None, *options).to(x.dtype)
            return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))
        grad, x, weight, *options, (by_x, by_weight, by_bias) = args
        rounded = map(_rounded, (grad, x, weight))
        gradients = target(*rounded, *options, [by_x, by_weight, False])[:2]
        wide = (each if each is None else each.to(x.dtype) for each in gradients)
        return *wide, grad.sum([0, *range(2, x.ndim)]) if by_bias else None


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def make(
    network: nn.Module,
    width: int,
    scaling: str,
    tensors: Sequence[Tensor],
    code: str,
    precision: str = "float32",
) -> Pass:
    """Return the pass of `width` replicas.

    Args:
        network: In training mode; neither it nor `tensors` are changed.
        width: Replicas; with more than one, all tensors but images and labels have them as their
            first axis.
        scaling: A key of `normlab.data.SCALINGS`.
        tensors: Examples of what the pass takes.
        code: `eager` to call the module anew every time, `traced` to replay the operations that it
            did once, `compiled` to have them compiled to machine code, `native` to have them done
            by normlab's kernels.
        precision: `bfloat16` to have matrix products and convolutions so; not with `eager`.

    Raises:
        InputError: The precision cannot be had.
        NotLoweredError: There is no kernel for something that the network does.
        Exception: The network cannot be traced or compiled; torch has many ways to say so.
    """
    eager = _Pass(network, width, scaling)
    if code == "eager":
        if precision != "float32":
            raise InputError(
                f"precision {precision} needs a network that does the same operations in every "
                "step, so that they can be recorded: use float32"
            )
        return lambda tensors: eager(*tensors)
    traced = make_fx(eager, tracing_mode="fake")(*tensors)
    if precision == "bfloat16":
        traced = make_fx(_InBfloat16(traced).run, tracing_mode="fake")(*tensors)
    for node in traced.graph.nodes:  # Autograd detaches what it saves, which nobody asks for here.
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    traced.graph.eliminate_dead_code()
    traced.recompile()
    on_cpu = tensors[0].is_cpu
    if not on_cpu:
        _refuse_moves(traced.graph)
    if code == "native":
        return lower(traced.graph, tensors)
    if code == "compiled":
        return _compiled(traced, tensors) if on_cpu else _compiled_here(traced, tensors)
    return _without_gradients(traced)


def _refuse_moves(graph: fx.Graph) -> None:
    """Refuse what no graph of a device can hold, before it is tried: torch does not recover well.

    Raises:
        RuntimeError: Something is moved to another device.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target == aten._to_copy.default:
            source, result = node.args[0].meta["val"].device, node.meta["val"].device
            if source != result:
                raise RuntimeError(f"the network moves values from {source} to {result} in a step")


def _without_gradients(function: Callable[..., Sequence[Tensor]]) -> Pass:
    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*tensors)

    return run


def are_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Tell whether tensors are the same up to roundings, each of them as a whole.

    Some consist of roundings: a bias before a batch norm has such a gradient. So what is tiny
    beside the largest tensor is the same too.
    """
    norms = [float(each.nan_to_num().norm()) for each in expected if each.is_floating_point()]
    for a, b in zip(found, expected, strict=True):
        if not a.is_floating_point():
            if not a.equal(b):
                return False
        elif not a.isfinite().equal(b.isfinite()):
            return False
        else:
            a, b = a.nan_to_num(), b.nan_to_num()
            if float((a - b).norm()) > tolerance * float(b.norm()) + 1e-6 * max(norms):
                return False
    return True


def _compiled(traced: Any, tensors: Sequence[Tensor]) -> Pass:
    """Compile a traced pass, or find it compiled.

    What was compiled is kept in the user's cache folder by a digest of the graph, the versions and
    the processor, and is compiled once, however many processes ask.
    """
    path = cache_folder() / "programs" / f"{_digest(traced, tensors)}.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own serialization.
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.pt2")
            with torch.no_grad():
                exported = torch.export.export(traced, tuple(tensors), strict=False)
                torch._inductor.aoti_compile_and_package(exported, package_path=str(partial))
            partial.replace(path)
        loaded: Any = torch._inductor.aoti_load_package(str(path))
    run: Pass = loaded.loader.run
    return run


def _compiled_here(traced: Any, tensors: Sequence[Tensor]) -> Pass:
    """Compile a traced pass for this process, in which a graph is to be recorded of it.

    What a package has around the kernels waits for events of the device, which no graph can hold;
    and what Python has around them is not in the graph.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own parts.
        return _without_gradients(torch._inductor.compile(traced, list(tensors)))


def _digest(traced: Any, tensors: Sequence[Tensor]) -> str:
    facts = [
        traced.print_readable(print_output=False),
        *(f"{each.dtype} {tuple(each.shape)} {each.stride()}" for each in tensors),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def dropouts_of(network: nn.Module) -> list[Dropout]:
    """Return the dropout layers that draw masks in training."""
    return [each for each in network.modules() if isinstance(each, Dropout) and each.p > 0]


def dropped(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what each layer of `dropouts_of` gets to see of a batch, in their order.

    Raises:
        InputError: One of them is not called exactly once.
    """
    network = copy.deepcopy(network)
    dropouts = dropouts_of(network)
    seen: list[list[Tensor]] = [[] for _ in dropouts]

    def watch(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[place].append(inputs[0].detach())

        return see

    for place, dropout in enumerate(dropouts):
        dropout.p = 0.0  # It is looked at, and draws nothing.
        dropout.register_forward_pre_hook(watch(place))
    if dropouts:
        network(x)
    names = {module: name for name, module in network.named_modules()}
    for dropout, inputs in zip(dropouts, seen, strict=True):
        if len(inputs) != 1:
            raise InputError(
                f"the dropout layer {names[dropout]!r} is called {len(inputs)} times in a pass: "
                "expected a layer of its own, with masks of its own, for each place"
            )
    return [inputs for (inputs,) in seen]
