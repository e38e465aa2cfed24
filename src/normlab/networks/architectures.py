"""The networks: a perceptron and a convolutional network of any sizes, and LeNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from normlab.errors import InputError
from normlab.networks.blocks import Slots, block

__all__ = ["cnn", "lenet", "mlp"]


def mlp(
    image_shape: tuple[int, int, int], classes: int, hidden: Sequence[int], slots: Slots
) -> nn.Sequential:
    """Return a perceptron with the given hidden sizes; its output layer has bare slots.

    Args:
        image_shape: (C, H, W) of the input, flattened.
        classes: Width of the output.
        hidden: Width of each hidden layer.
        slots: What stands around each hidden layer.

    >>> [name for name, _ in mlp((1, 28, 28), 10, [32, 32], Slots()).named_children()]
    ['flatten', 'hidden0', 'hidden1', 'output']
    """
    channels, height, width = image_shape
    widths = [channels * height * width, *hidden]
    parts: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(len(hidden)):
        parts.append((f"hidden{i}", block(nn.Linear(widths[i], widths[i + 1]), slots)))
    parts.append(("output", nn.Linear(widths[-1], classes)))
    return nn.Sequential(OrderedDict(parts))


def cnn(
    image_shape: tuple[int, int, int], classes: int, channels: Sequence[int], slots: Slots
) -> nn.Sequential:
    """Return 3×3 convolutions with 2×2 max pooling after every second one, and an output layer.

    Convolutions pad their input, so that they keep its height and width.

    Args:
        image_shape: (C, H, W) of the input; each pooling halves H and W, rounded down.
        classes: Width of the output.
        channels: Of each convolution.
        slots: What stands around each convolution.

    Raises:
        InputError: The image is too small for so many poolings.

    Source: the pattern of Simonyan and Zisserman, 2015, who put two to four convolutions before a
    pooling.

    >>> [name for name, _ in cnn((3, 32, 32), 10, [32, 32, 64], Slots()).named_children()]
    ['conv0', 'conv1', 'pool1', 'conv2', 'flatten', 'output']
    """
    width, high, wide = image_shape
    least = 2 ** (len(channels) // 2)
    if min(high, wide) < least:
        raise InputError(
            f"cnn with {len(channels)} convolutions pools {len(channels) // 2} times and needs "
            f"images of at least {least}×{least}, and got {high}×{wide}"
        )
    parts: list[tuple[str, nn.Module]] = []
    for i, channel in enumerate(channels):
        parts.append((f"conv{i}", block(nn.Conv2d(width, channel, 3, padding=1), slots)))
        width = channel
        if i % 2:
            parts.append((f"pool{i}", nn.MaxPool2d(2)))
            high, wide = high // 2, wide // 2
    parts += [("flatten", nn.Flatten()), ("output", nn.Linear(width * high * wide, classes))]
    return nn.Sequential(OrderedDict(parts))


def lenet(image_shape: tuple[int, int, int], classes: int, slots: Slots) -> nn.Sequential:
    """Return LeNet: convolutions 6@5×5 and 16@5×5 with 2×2 average pooling, then 120, 84, classes.

    Source: LeCun, Bottou, Bengio and Haffner, 1998, in the form that textbooks give it.

    Args:
        image_shape: (C, H, W) of the input, at least 16×16.
        classes: Width of the output.
        slots: What stands around each layer but the last.

    Raises:
        InputError: The image is too small for two convolutions and poolings.

    >>> import torch
    >>> lenet((1, 28, 28), 10, Slots(activation="sigmoid"))(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    channels, height, width = image_shape
    high, wide = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    if high < 1 or wide < 1:
        raise InputError(f"lenet needs images of at least 16×16, and got {height}×{width}")
    return nn.Sequential(
        OrderedDict(
            conv0=block(nn.Conv2d(channels, 6, kernel_size=5), slots),
            pool0=nn.AvgPool2d(2),
            conv1=block(nn.Conv2d(6, 16, kernel_size=5), slots),
            pool1=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            hidden0=block(nn.Linear(16 * high * wide, 120), slots),
            hidden1=block(nn.Linear(120, 84), slots),
            output=nn.Linear(84, classes),
        )
    )
