"""The kinds of norm layers: their names, which a layer is, and its equivalent of another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normlab import layers
from normlab.errors import InputError, did_you_mean
from normlab.layers import NormConstructor, RMSNorm, norm_constructor
from normlab.surgery.models import modes_kept
from normlab.surgery.standins import STANDINS, ChannelScale, Follows

__all__ = [
    "OPTIONS",
    "TO_OURS",
    "TO_TORCH",
    "Call",
    "Kind",
    "calls_noted",
    "check_shape",
    "equivalent",
    "is_ours",
    "kinds_of",
    "parse",
    "spatial_dimensions",
    "with_what_follows",
]

NAMES = ("batch", "torch-batch", "sync", "ghost:32", "group:8", "layer", "instance", "rms", "none")
TO_OURS: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
    nn.SyncBatchNorm: layers.SyncBatchNorm,
}
TO_TORCH: dict[type[nn.Module], Any] = {ours: torchs for torchs, ours in TO_OURS.items()}
OPTIONS = tuple(
    inspect.signature(layers.BatchNorm1d).parameters.keys()
    - inspect.signature(nn.BatchNorm1d).parameters.keys()
)
# What the classes of norm layers set on them; all else is the user's. The rest of torch's and
# normlab's own begins with an underscore.
_OWN = {"training", "name", "num_batches_skipped", "inplace"}
for _cls in (
    *(layers.BatchNorm1d, layers.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d),
    *(nn.RMSNorm, RMSNorm, nn.Identity),
):
    _OWN |= {*inspect.signature(_cls).parameters}
_CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)
_RANKS: dict[type[nn.Module], int] = {
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}


class Kind(NamedTuple):
    """What `convert` is asked for.

    Attributes:
        name: As it was asked for.
        is_batch: It is batch normalization.
        construct: Takes the number of channels and of spatial dimensions; None for an identity.
        ghost_size: Of "ghost:N".
    """

    name: str
    is_batch: bool
    construct: NormConstructor | None
    ghost_size: int | None = None

    @property
    def follows(self) -> bool:
        """Whether its layers do what follows them."""
        return self.is_batch and self.name != "torch-batch"


def parse(name: str, *, calibrated: bool = False) -> Kind:
    """Return the kind of a name.

    Args:
        name: One of "batch", "torch-batch", "sync", "ghost:N", "group:G", "layer", "instance",
            "rms" and "none".
        calibrated: Let "none" be a scale and a shift, where it is an identity otherwise.

    Raises:
        InputError: There is none of that name.

    >>> parse("ghost:32").construct(3, 2)
    BatchNorm2d(3, ..., ghost_size=32)
    """
    word, colon, number = str(name).partition(":")
    if word == "ghost":
        if not number.isdecimal() or int(number) == 0:
            raise InputError(f"{name!r}: expected the samples in a ghost batch, as in ghost:32")
        batch, size = norm_constructor("batch"), int(number)

        def ghost(channels: int, spatial: int) -> nn.Module:
            layer: Any = batch(channels, spatial)
            layer.ghost_size = size
            return layer

        return Kind(name, True, ghost, size)
    if (word not in ("group", *NAMES)) or (colon and word != "group"):
        known = ", ".join(map(repr, NAMES))
        raise InputError(
            f"unknown target {name!r}: known are {known}{did_you_mean(str(name), NAMES)}"
        )
    if word == "none":
        return Kind(
            name, False, (lambda channels, _: ChannelScale(channels)) if calibrated else None
        )
    if word == "sync":
        return Kind(name, True, lambda channels, _: layers.SyncBatchNorm(channels))
    return Kind(name, word in ("batch", "torch-batch"), norm_constructor(name))


def is_ours(layer: nn.Module) -> bool:
    """Tell whether a layer is one of normlab's batch norms."""
    return isinstance(layer, tuple(TO_TORCH))


def kinds_of(layer: nn.Module) -> set[str]:
    """Return the names by which one would ask for what a layer is; none if it is no norm layer.

    >>> sorted(kinds_of(nn.GroupNorm(1, 4)))
    ['group:1', 'layer']
    """
    if is_ours(layer):
        ghost_size: Any = layer.ghost_size
        # A synchronized layer is normlab's batch norm too, as one of torch's is torch's.
        synchronized = {"sync", "batch"} if isinstance(layer, layers.SyncBatchNorm) else {"batch"}
        return synchronized if ghost_size is None else {f"ghost:{ghost_size}"}
    if isinstance(layer, _BatchNorm):
        return {"torch-batch"}
    if isinstance(layer, nn.GroupNorm):
        return {f"group:{layer.num_groups}"} | ({"layer"} if layer.num_groups == 1 else set())
    if isinstance(layer, _NormBase):
        return {"instance"}
    if isinstance(layer, nn.LayerNorm):
        return {"layer"}
    if isinstance(layer, (nn.RMSNorm, RMSNorm)):
        return {"rms"}
    return {"none"} if isinstance(layer, (nn.Identity, ChannelScale)) else set()


class Call(NamedTuple):
    """How a layer is called: the shape of its input, and what comes along with it."""

    shape: tuple[int, ...]
    residual: bool = False
    masked: bool = False


@contextmanager
def calls_noted(model: nn.Module, found: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """Note how the named layers are called, while the model is in eval mode without gradients.

    >>> model = nn.Sequential(nn.BatchNorm1d(3))
    >>> with calls_noted(model, ["0"]) as calls:
    ...     _ = model(torch.ones(2, 3))
    >>> calls["0"]
    [Call(shape=(2, 3), residual=False, masked=False)]
    """
    calls: dict[str, list[Call]] = {name: [] for name in found}

    def note(name: str) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first: Tensor = [*inputs, *named.values()][0]
            residual = len(inputs) > 1 or named.get("residual") is not None
            masked = any(named.get(each) is not None for each in ("mask", "lengths"))
            calls[name].append(Call(tuple(first.shape), residual, masked))

        return see

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        for name in calls
    ]
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def equivalent(
    name: str, layer: Any, construct: NormConstructor | None, calls: list[Call] | None
) -> tuple[nn.Module, list[str]]:
    """Build the equivalent of a layer of another kind.

    Args:
        name: The layer's, for messages.
        layer: Any norm layer, or what was put in the place of one.
        construct: Builds the new one; None for an identity.
        calls: How the layer is called; None if that is not known.

    Returns:
        The new layer, of the old one's type and device, with those of its parameters and buffers
        that it has room for; and the names of these.

    Raises:
        InputError: There is none.
    """
    if construct is None:
        new = with_what_follows(name, layer, nn.Identity(), calls or [])
        return new, _carry_attributes(layer, new)
    if calls is not None and not calls:
        raise InputError(f"{name}: {type(layer).__name__} is not called when the network is")
    for call in calls or ():
        check_shape(name, layer, call.shape)
    new = _construct(name, layer, construct, calls)
    if isinstance(new, _BatchNorm) and isinstance(layer, _BatchNorm):
        options = (layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        ghosts: dict[str, Any] = {"ghost_size": new.ghost_size} if is_ours(new) else {}
        new = type(new)(layer.num_features, *options, **ghosts)
    new = with_what_follows(name, layer, new, calls or [])
    for each in (*layer.parameters(), *layer.buffers()):
        if each.is_floating_point():
            new.to(each.device, each.dtype)
            break
    living = []
    for group, others in ((new._parameters, layer._parameters), (new._buffers, layer._buffers)):
        for each, value in group.items():
            other = others.get(each)
            if value is not None and other is not None and value.shape == other.shape:
                group[each] = other
                living.append(each)
    return new, living + _carry_attributes(layer, new)


def _carry_attributes(layer: nn.Module, new: nn.Module) -> list[str]:
    """Give a new layer what the user has set on the old one, and return the names of that."""
    users = [name for name in vars(layer) if name[0] != "_" and name not in _OWN]
    vars(new).update({name: vars(layer)[name] for name in users})
    return users


def check_shape(name: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse an input whose channels are not on the second axis."""
    kind = type(layer).__name__
    if not 2 <= len(shape) <= 5:
        raise InputError(f"{name}: {kind} gets {shape}: expected (N, C), (N, C, L), …")
    whole = len(shape) == 2 or list(shape[1:]) == list(getattr(layer, "normalized_shape", ()))
    if isinstance(layer, _CHANNELS_LAST) and not whole:
        raise InputError(
            f"{name}: {kind} normalizes the last axes of {shape}; the norms that "
            "could take its place have the channels on the second"
        )
    spatial = spatial_dimensions(layer)
    if isinstance(layer, _NormBase) and spatial is not None and len(shape) != spatial + 2:
        raise InputError(f"{name}: {kind} gets {shape}, one sample alone: expected (N, C, …)")


def _construct(
    name: str, layer: nn.Module, construct: NormConstructor, calls: list[Call] | None
) -> nn.Module:
    kind, spatial = type(layer).__name__, spatial_dimensions(layer)
    if calls:
        channels = calls[0].shape[1]
        # Of a layer with several uses each has to do. At one position there is nothing more to
        # normalize over than without any.
        several = {len(call.shape) - 2 for call in calls}
        several |= {0 for call in calls if torch.Size(call.shape[2:]).numel() == 1}
    else:
        channels = _channels(layer)
        several = {spatial} if spatial is not None else {0, 1, 2, 3}
    news: list[nn.Module | InputError | None] = []
    for each in sorted(several):
        try:
            news.append(construct(channels, each))
        except InputError as error:
            news.append(error)
    errors = [each for each in news if isinstance(each, InputError)]
    # Whether the channels are on its last axis, a layer norm does not say either.
    unsure = len({type(each) for each in news}) > 1 or isinstance(layer, _CHANNELS_LAST)
    if not calls and unsure:
        raise InputError(
            f"{name}: {kind} may get (N, C) or more, which decides what can take its place: pass "
            "example=, an input of the network"
        )
    if errors:
        raise InputError(f"{name}: {errors[0]}")
    if None in news:
        raise InputError(
            f"{name}: {kind} gets one value per channel and sample, of which there is nothing to "
            "normalize"
        )
    new = news[-1]
    assert isinstance(new, nn.Module)
    return new


def spatial_dimensions(layer: Any) -> int | None:
    """Return how many spatial dimensions a layer's input has, if the layer says that."""
    for cls, spatial in _RANKS.items():
        if isinstance(layer, cls):
            return spatial
    shape = getattr(layer, "normalized_shape", ())
    return len(shape) - 1 if len(shape) > 1 else None


def _channels(layer: Any) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    if hasattr(layer, "normalized_shape"):
        return int(layer.normalized_shape[0])
    weight = getattr(layer, "weight", None)
    return 0 if weight is None else len(weight)


def with_what_follows(name: str, layer: Any, new: nn.Module, calls: list[Call]) -> nn.Module:
    """Let a layer add and activate if the one before it does so itself."""
    if is_ours(new):
        given = {each: getattr(layer, each) for each in OPTIONS if hasattr(layer, each)}
        ours: Any = new
        ours._set_options(**given | {"ghost_size": ours.ghost_size})
        return new
    if any(call.masked for call in calls):
        raise InputError(
            f"{name}: {type(layer).__name__} is called with a mask or lengths, which only "
            "normlab's batch norms take"
        )
    activation = getattr(layer, "activation", None)
    follows = activation is not None or any(call.residual for call in calls)
    if follows and type(new) in STANDINS and (is_ours(layer) or isinstance(layer, Follows)):
        new.__class__ = STANDINS[type(new)]
        vars(new)["activation"] = activation
        vars(new)["negative_slope"] = layer.negative_slope
    return new
