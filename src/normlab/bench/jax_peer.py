"""The fleet in JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from normlab.bench.work import EVALUATED, REPLICAS, STEPS, Peer, Work, layers_of
from normlab.data import SCALINGS

__all__ = ["jax_evaluator", "jax_fleet", "jax_state", "jax_trainer"]


def jax_fleet(work: Work, *, replicas: int = REPLICAS) -> Peer:
    """Train replicas in JAX: `jit` of `scan` over steps of `vmap` over replicas.

    On a CPU, XLA runs convolutions several times slower inside a loop, and slower stacked, so a
    network that has any is trained in the form that is fastest in JAX: one replica, a program a
    step.
    """
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    steps = min(STEPS, work.steps_per_epoch)
    if any(isinstance(layer, nn.Conv2d) for _, layer in layers_of(work.build(0))):
        replicas, span = 1, 1
    else:
        span = max(1, steps // replicas)
    programs = max(1, steps // (replicas * span))
    images, labels = (jnp.asarray(each.numpy()) for each in work.load())
    evaluated = min(EVALUATED, len(images))
    orders = [work.batches(seed) for seed in range(replicas)]
    state = jax_state(work, replicas)
    step, look = jax_trainer(work), jax_evaluator(work)

    def train() -> float:
        nonlocal state
        means = []
        for _ in range(programs):
            batches = np.stack([[next(order).numpy() for order in orders] for _ in range(span)])
            state, losses = step(state, images, labels, batches)
            means.append(losses.mean())
        return float(np.mean(jax.device_get(means)))

    def evaluate() -> float:
        losses, _ = look(state, images[:evaluated], labels[:evaluated])
        return float(losses.mean())

    return Peer(train, programs * span * replicas, evaluate, evaluated * replicas)


def jax_state(work: Work, replicas: int) -> dict[str, Any]:
    """Return what JAX trains from: the values of `replicas` networks, stacked, by their names."""
    import jax.numpy as jnp

    networks = [work.build(seed) for seed in range(replicas)]

    def stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {
            name: jnp.asarray(np.stack([each[name].detach().numpy() for each in tensors]))
            for name in tensors[0]
        }

    parameters = stacked([dict(network.named_parameters()) for network in networks])
    state = {
        "parameters": parameters,
        "buffers": stacked([dict(network.named_buffers()) for network in networks]),
        "lr": jnp.full(replicas, work.lr),
        "step": jnp.zeros(replicas),
    }
    if work.optimizer == "adam":
        for moment in ("mean", "square"):
            state[moment] = {name: jnp.zeros_like(value) for name, value in parameters.items()}
    return state


def jax_trainer(work: Work) -> Any:
    """Return `train(state, images, labels, batches)`, compiled: the new state, and the losses.

    `batches` are indices, (steps, replicas, batch); losses are (steps, replicas).
    """
    import jax

    layers = layers_of(work.build(0))

    def loss_of(parameters: Any, buffers: Any, x: Any, y: Any) -> Any:
        changed = dict(buffers)
        for name, layer in layers:
            x = _jax_layer(name, layer, parameters, changed, x)
        return _jax_losses(x, y).mean(), changed

    def step(state: Any, batch: Any, images: Any, labels: Any) -> Any:
        x, y = (each.at[batch].get(mode="promise_in_bounds") for each in (images, labels))
        x = _jax_scale(work, x)
        (loss, buffers), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state["parameters"], state["buffers"], x, y
        )
        return _jax_update(work, state, gradients) | {"buffers": buffers}, loss

    def train(state: Any, images: Any, labels: Any, batches: Any) -> Any:
        def fleet_step(state: Any, batch: Any) -> Any:
            return jax.vmap(step, in_axes=(0, 0, None, None))(state, batch, images, labels)

        if len(batches) == 1:  # XLA would make a loop even of one.
            state, losses = fleet_step(state, batches[0])
            return state, losses[None]
        return jax.lax.scan(fleet_step, state, batches)

    return jax.jit(train, donate_argnums=0)


def jax_evaluator(work: Work) -> Any:
    """Return `evaluate(state, images, labels)`, compiled: loss and accuracy of every replica."""
    import jax

    layers = layers_of(work.build(0))

    def one(parameters: Any, buffers: Any, x: Any, y: Any) -> Any:
        for name, layer in layers:
            x = _jax_layer(name, layer, parameters, buffers, x, training=False)
        return _jax_losses(x, y).mean(), (x.argmax(-1) == y).mean()

    def evaluate(state: Any, images: Any, labels: Any) -> Any:
        x = _jax_scale(work, images)
        every = jax.vmap(one, in_axes=(0, 0, None, None))
        return every(state["parameters"], state["buffers"], x, labels)

    return jax.jit(evaluate)


def _jax_scale(work: Work, images: Any) -> Any:
    """Return images as floats, channels last: XLA's convolutions on a CPU want them there."""
    import jax.numpy as jnp

    factor, offset = SCALINGS[work.scaling]
    return jnp.moveaxis(images.astype(float) * factor + offset, 1, -1)


def _jax_losses(logits: Any, labels: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)


def _jax_layer(
    name: str, layer: nn.Module, parameters: Any, buffers: Any, x: Any, *, training: bool = True
) -> Any:
    """Apply a torch layer; in training, a norm's new statistics go into `buffers`."""
    import jax
    import jax.numpy as jnp

    if isinstance(layer, nn.Flatten):
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # In torch's order, for its weights.
    if isinstance(layer, nn.ReLU):
        return jnp.maximum(x, 0)
    if isinstance(layer, nn.Sigmoid):
        return jax.nn.sigmoid(x)
    if isinstance(layer, nn.AvgPool2d):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
        raise NotImplementedError(f"{layer} is not written in JAX here")
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if isinstance(layer, nn.Linear):
        return x @ weight.T + bias
    if isinstance(layer, nn.Conv2d):
        layout = ("NHWC", "OIHW", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=layout)
        return y + bias
    if not training:
        mean, variance = (buffers[f"{name}.running_{key}"] for key in ("mean", "var"))
        factor = weight * jax.lax.rsqrt(variance + layer.eps)
        return x * factor + (bias - mean * factor)
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    mean, variance = x.mean(axes), x.var(axes)
    momentum = layer.momentum or 0.0
    for key, value in (("mean", mean), ("var", variance * (count / (count - 1)))):
        running = buffers[f"{name}.running_{key}"]
        buffers[f"{name}.running_{key}"] = (1 - momentum) * running + momentum * value
    buffers[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    factor = weight * jax.lax.rsqrt(variance + layer.eps)
    return x * factor + (bias - mean * factor)


def _jax_update(work: Work, state: Any, gradients: Any) -> Any:
    """Return the state after a step of plain SGD, or of Adam with torch's defaults."""
    import jax
    import jax.numpy as jnp

    parameters, lr, step = state["parameters"], state["lr"], state["step"] + 1
    if work.optimizer == "sgd":
        moved = jax.tree.map(lambda p, g: p - lr * g, parameters, gradients)
        return state | {"parameters": moved, "step": step}
    first, second, eps = 0.9, 0.999, 1e-8
    mean = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state["mean"], gradients)
    square = jax.tree.map(
        lambda v, g: second * v + (1 - second) * g * g, state["square"], gradients
    )
    rate, correction = lr / (1 - first**step), jnp.sqrt(1 - second**step)
    moved = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) / correction + eps), parameters, mean, square
    )
    return state | {"parameters": moved, "mean": mean, "square": square, "step": step}
