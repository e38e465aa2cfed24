"""Signals of where batch norms stand in a network, and of how they are set up for training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normlab.doctor.finding import Finding, MissingError
from normlab.doctor.observations import Layer, Observations
from normlab.doctor.thresholds import THRESHOLDS, threshold
from normlab.probes import pooled

__all__ = [
    "dropout_before",
    "explosion",
    "frozen_yet_updating",
    "on_logits",
    "redundant_bias",
    "shared_layer",
    "weight_decay",
]


def redundant_bias(seen: Observations) -> Iterator[Finding]:
    """A bias that the mean of the next layer takes away again."""
    for name, before in seen.flow.biases.items():
        if not seen.layers[name].held:
            yield Finding(
                "redundant bias",
                before,
                "information",
                "biases that the next layer's mean takes away, channels",
                float(seen.layers[name].module.num_features),
                0.0,
                f"{name or 'the next layer'} subtracts the batch's mean, and any bias with it",
                "layer = nn.Conv2d(…, bias=False)  # or nn.Linear, where the model is built",
                "Ioffe and Szegedy, Batch Normalization, 2015, section 3.2",
            )


def dropout_before(seen: Observations) -> Iterator[Finding]:
    """Dropout that changes the variance of what a batch norm gets, in training alone."""
    for layer in seen.layers.values():
        if not layer.dropped or layer.held:
            continue
        still, dropped = pooled(layer.calls[0]), pooled(layer.dropped)
        ratio = ((still.var + layer.module.eps) / (dropped.var + layer.module.eps)).log()
        shift = float(ratio[ratio.isfinite()].mean())
        if abs(shift) > threshold("dropout"):
            names = ", ".join(seen.flow.dropouts[layer.name])
            yield Finding(
                "dropout before batch norm",
                layer.name,
                "information" if _fits(layer, still.var) else "warning",
                "mean of ln(variance without dropout / variance with it)",
                shift,
                threshold("dropout") if shift > 0 else -threshold("dropout"),
                f"in training the running variance becomes that with dropout ({names}), and "
                "evaluation has none",
                f"{seen.recalibrate}  # or dropout after the last batch norm",
                THRESHOLDS["dropout"].source,
            )


def _fits(layer: Layer, var: Tensor) -> bool:
    """Tell whether a layer's running variance is one already, as after recalibration."""
    if layer.running is None:
        return True
    eps = layer.module.eps
    ratio = ((layer.running[1] + eps) / (var + eps)).log()
    return abs(float(ratio[ratio.isfinite()].mean())) <= threshold("dropout")


def on_logits(seen: Observations) -> Iterator[Finding]:
    """A batch norm whose output is the model's scores of classes."""
    if seen.labels is None or seen.width is None:
        raise MissingError("labels of classes: batches of (input, labels)")
    for name in seen.flow.last:
        yield Finding(
            "batch norm on logits",
            name,
            "warning",
            "batch norms between the last weights and the loss",
            1.0,
            0.0,
            "scores are held to a fixed mean and variance over the batch, and so to each other's",
            f"{seen.reached}.set_submodule({name!r}, nn.Identity())  # and train again",
            "normlab: the loss wants scores as large as the evidence is",
        )


def shared_layer(seen: Observations) -> Iterator[Finding]:
    """One layer for inputs that differ, so that its statistics are neither's."""
    for layer in seen.layers.values():
        if len(layer.calls) < 2 or layer.held:
            continue
        parts = [pooled(call) for call in layer.calls]
        deviation = (pooled(parts).var + layer.module.eps).sqrt()
        means = torch.stack([each.mean for each in parts])
        z = (means.amax(0) - means.amin(0)) / deviation
        largest = float(torch.quantile(z[z.isfinite()], 0.95)) if z.isfinite().any() else 0.0
        if largest > threshold("shared"):
            yield Finding(
                "shared layer",
                layer.name,
                "warning",
                f"95th percentile of the distance in deviations between the means of its "
                f"{len(parts)} calls",
                largest,
                threshold("shared"),
                "it keeps one mean and variance for inputs that differ, and evaluation fits none",
                f"self.norms = nn.ModuleList({_new(layer)} for _ in range({len(parts)}))",
                THRESHOLDS["shared"].source,
            )


def _new(layer: Layer) -> str:
    """Return the expression that makes another such layer."""
    name = type(layer.module).__name__
    return f"{'nn.' * hasattr(nn, name)}{name}({layer.module.num_features})"


def frozen_yet_updating(seen: Observations) -> Iterator[Finding]:
    """Layers with frozen parameters that still normalize by the batch and move their statistics."""
    frozen = [
        layer
        for layer in seen.layers.values()
        if layer.module.affine
        and layer.frozen_parameters
        and layer.running is not None
        and not layer.held
    ]
    if frozen and not any(layer.training for layer in seen.layers.values()):
        raise MissingError("the model in the mode in which it is trained: model.train()")
    for layer in frozen:
        if not layer.training:
            continue
        own = list(layer.module.parameters(recurse=False))
        yield Finding(
            "frozen yet updating",
            layer.name,
            "warning",
            "parameters that are frozen in a layer in training mode",
            float(len(own)),
            0.0,
            "requires_grad = False does not stop running statistics, which drift in training",
            f"normlab.freeze({seen.at(layer)}, 'statistics', inplace=True)",
            "pytorch issue 86590",
        )


def weight_decay(seen: Observations) -> Iterator[Finding]:
    """γ and β that the optimizer pulls to zero."""
    if seen.decay is None:
        raise MissingError("optimizer=")
    for layer in seen.layers.values():
        own = [f"{layer.name}.{key}".lstrip(".") for key in ("weight", "bias")]
        decay = max((seen.decay.get(name, 0.0) for name in own), default=0.0)
        if decay > 0:
            yield Finding(
                "decay on γ and β",
                layer.name,
                "information",
                "weight decay",
                decay,
                0.0,
                "decay of γ and β acts otherwise than that of weights before a norm, whose length "
                "does not matter",
                "groups = [{'params': others}, {'params': norms, 'weight_decay': 0.0}]",
                "He et al., Bag of Tricks, 2019",
            )


def explosion(seen: Observations) -> Iterator[Finding]:
    """Gradients that grow from layer to layer, the further from the loss the larger."""
    if seen.gradient_unknown:
        raise MissingError(seen.gradient_unknown)
    # In the order of the model, as far as its names tell it.
    measured = [(each.name, each.gradient) for each in seen.layers.values() if each.gradient]
    sizes = [size for _, size in measured]
    if not all(map(math.isfinite, sizes)):
        raise MissingError("gradients that are finite")
    if len(sizes) < 2:
        return
    total = sizes[0] / sizes[-1]
    each = total ** (1 / (len(sizes) - 1))
    if total > threshold("growth total") and each > threshold("growth"):
        yield Finding(
            "gradient explosion",
            measured[0][0],
            "error",
            f"growth of ‖δ‖² over {len(sizes)} layers, {each:.3g} a layer",
            total,
            threshold("growth total"),
            "the first layers get gradients so much larger that no learning rate suits all",
            "x = x + block(x)  # skip connections",
            THRESHOLDS["growth"].source,
        )
