"""Evaluation: what networks make of images, in large batches that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.data import gather

__all__ = ["evaluate"]

EVALUATION_BATCH = 2000


@torch.no_grad()
def evaluate(
    networks: Sequence[Callable[[Tensor], Tensor]],
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    scaling: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
) -> list[tuple[float, float]]:
    """Return the mean cross-entropy and the accuracy of several networks on the same images.

    Args:
        networks: In eval mode; each turns images into logits.
        images: uint8, shape (N, C, H, W), or any inputs that are no bytes, taken as they are.
        labels: int64, shape (N,).
        indices: Which of the N, int64.
        scaling: As `normlab.data.scale` takes it.
        dtype: Of the networks.
        batch_size: Images at a time; `EVALUATION_BATCH` if none is given.
    """
    # Where the images are, so that nothing waits for a device before the end.
    loss = torch.zeros(len(networks), dtype=torch.float64, device=images.device)
    correct = torch.zeros_like(loss)
    is_bytes = images.dtype == torch.uint8
    for batch in indices.split(batch_size or EVALUATION_BATCH):
        x = gather(images, batch, scaling).to(dtype) if is_bytes else images[batch]
        y = labels[batch]
        for i, network in enumerate(networks):
            logits = network(x)
            loss[i] += F.cross_entropy(logits, y, reduction="sum")
            correct[i] += (logits.argmax(1) == y).sum()
    n = len(indices)
    return list(zip((loss / n).tolist(), (correct / n).tolist(), strict=True))
