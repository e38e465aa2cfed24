"""ResNet-18 for small images."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from normlab.errors import InputError
from normlab.layers import Dropout
from normlab.networks.blocks import ACTIVATIONS, Slots

__all__ = ["BasicBlock", "resnet18"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them.

    Args:
        channels_in: Of the input.
        channels_out: Of the output.
        stride: Of the first convolution, and of the shortcut's.
        slots: The norm after each convolution, and the activation.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016, figure 5.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, slots: Slots) -> None:
        super().__init__()
        self.conv0 = _convolution(channels_in, channels_out, 3, stride)
        self.norm0 = _norm(channels_out, slots)
        self.activation0 = ACTIVATIONS[slots.activation]()
        self.conv1 = _convolution(channels_out, channels_out, 3, 1)
        self.norm1 = _norm(channels_out, slots)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut.append(_convolution(channels_in, channels_out, 1, stride))
            self.shortcut.append(_norm(channels_out, slots))
        self.activation1 = ACTIVATIONS[slots.activation]()

    def forward(self, input: Tensor) -> Tensor:
        """Return `activation(branch(input) + shortcut(input))`."""
        hidden = self.activation0(self.norm0(self.conv0(input)))
        return self.activation1(self.norm1(self.conv1(hidden)) + self.shortcut(input))


def resnet18(image_shape: tuple[int, int, int], classes: int, slots: Slots) -> nn.Sequential:
    """Return ResNet-18 with a first convolution of 3×3 and stride 1, as is usual for 32×32 images.

    Args:
        image_shape: (C, H, W) of the input.
        classes: Width of the output.
        slots: The norm after each convolution, the activation, and dropout before the output.

    Raises:
        InputError: The norm is to stand elsewhere than before the activation.

    >>> import torch
    >>> resnet18((3, 32, 32), 10, Slots())(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if slots.norm is not None and slots.position != "pre":
        raise InputError(
            f"resnet18 has its norms before the activation: leave @{slots.position} out"
        )
    stem = OrderedDict(
        conv=_convolution(image_shape[0], 64, 3, 1),
        norm=_norm(64, slots),
        activation=ACTIVATIONS[slots.activation](),
    )
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    widths = [64, 64, 128, 256, 512]
    for stage, (channels_in, channels_out) in enumerate(pairwise(widths)):
        stride = 1 if stage == 0 else 2
        parts[f"stage{stage}"] = nn.Sequential(
            BasicBlock(channels_in, channels_out, stride, slots),
            BasicBlock(channels_out, channels_out, 1, slots),
        )
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    if slots.dropout:
        parts["dropout"] = Dropout(slots.dropout)
    parts["output"] = nn.Linear(512, classes)
    return nn.Sequential(parts)


def _convolution(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)


def _norm(channels: int, slots: Slots) -> nn.Module:
    norm = None if slots.norm is None else slots.norm(channels, 2)
    return nn.Identity() if norm is None else norm
