"""What a data set is made of: counts, shapes, mean and deviation, and a sheet of its images."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from normlab.data.datasets import Dataset

__all__ = ["Description", "contact_sheet", "describe"]

_MARGIN = 4
_LEAST, _MOST = 48, 96  # Pixels of an image on the sheet.


@dataclass(frozen=True)
class Description:
    """A data set in numbers.

    Attributes:
        name: As `load` takes it.
        image_shape: (C, H, W).
        class_names: In the order of the labels; the labels themselves if the classes have none.
        train: Training images of each class.
        test: Test images of each class.
        test_is_drawn: Whether the test set was drawn from the user's images, for want of one.
        mean: Of each channel over the training images, bytes scaled to 0..1.
        deviation: Standard deviation, likewise.
        digest: SHA-256 of the user's own data; None for a published set.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train: list[int]
    test: list[int]
    test_is_drawn: bool
    mean: list[float]
    deviation: list[float]
    digest: str | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table for people."""
        channels, height, width = self.image_shape
        pixels = "gray" if channels == 1 else "RGB"
        drawn = " (one of six of each class, drawn here)" if self.test_is_drawn else ""
        names = ["class", *self.class_names, "all"]
        columns = [
            [title, *map(str, counts), str(sum(counts))]
            for title, counts in (("train", self.train), ("test", self.test))
        ]
        width_of_names = max(map(len, names))
        lines = [
            f"{self.name}: {sum(self.train):,} training and {sum(self.test):,} test images{drawn}",
            f"images: {width}×{height}, {pixels}, mean {_numbers(self.mean)}, "
            f"deviation {_numbers(self.deviation)}",
            *([f"SHA-256: {self.digest}"] if self.digest else []),
            "",
        ]
        lines += [
            f"{name:{width_of_names}}  {train:>7}  {test:>7}"
            for name, train, test in zip(names, *columns, strict=True)
        ]
        return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def describe(dataset: Dataset) -> Description:
    """Count a data set, and measure its training images.

    >>> from normlab.data import load
    >>> described = describe(load("mnist"))
    >>> described.test[0], round(described.mean[0], 4), round(described.deviation[0], 4)
    (980, 0.1307, 0.3081)
    """
    size = dataset.train_size
    counts = [
        labels.bincount(minlength=dataset.classes).tolist()
        for labels in (dataset.labels[:size], dataset.labels[size:])
    ]
    histogram = _histogram(dataset.images[:size])
    shares = histogram / histogram.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    deviation = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return Description(
        name=dataset.name,
        image_shape=dataset.image_shape,
        class_names=_names(dataset),
        train=counts[0],
        test=counts[1],
        test_is_drawn=dataset.test_is_drawn,
        mean=mean.tolist(),
        deviation=deviation.tolist(),
        digest=dataset.digest,
    )


def _histogram(images: Tensor) -> Tensor:
    """Count the pixels of each value, (C, 256): exact, and without the images as floats."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for some in images.split(1000):
        for channel, count in enumerate(counts):
            count += some[:, channel].flatten().bincount(minlength=256)
    return counts


def _names(dataset: Dataset) -> tuple[str, ...]:
    return dataset.class_names or tuple(map(str, range(dataset.classes)))


def _size_on_sheet(height: int, width: int) -> tuple[int, int]:
    if height < _LEAST:
        factor = -(-_LEAST // height)
        return height * factor, width * factor
    shrunk = min(1.0, _MOST / max(height, width))
    return max(1, round(height * shrunk)), max(1, round(width * shrunk))


def contact_sheet(dataset: Dataset, columns: int = 10, most_classes: int = 50) -> bytes:
    """Draw the first training images of each class, a row for each, with the classes' names.

    Args:
        dataset: Whose.
        columns: Images in a row.
        most_classes: Rows; further classes are left out.

    Returns:
        A PNG.

    >>> from normlab.data import load
    >>> contact_sheet(load("mnist"), columns=2)[1:4]
    b'PNG'
    """
    from PIL import Image, ImageDraw, ImageFont

    names = _names(dataset)[:most_classes]
    height, width = _size_on_sheet(*dataset.image_shape[1:])
    font = ImageFont.load_default(size=14)
    # Pixels that are enlarged stay to be seen, and those that are too many are averaged.
    enlarged = height >= dataset.image_shape[1]
    resampling = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
    left = int(max(font.getlength(name) for name in names)) + 2 * _MARGIN
    size = (left + columns * (width + _MARGIN), _MARGIN + len(names) * (height + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    labels = dataset.labels[: dataset.train_size]
    for row, name in enumerate(names):
        top = _MARGIN + row * (height + _MARGIN)
        draw.text((_MARGIN, top + height / 2), name, fill="black", font=font, anchor="lm")
        for column, index in enumerate((labels == row).nonzero()[:columns, 0].tolist()):
            pixels = dataset.images[index].permute(1, 2, 0).expand(-1, -1, 3).numpy()
            image = Image.fromarray(pixels).resize((width, height), resampling)
            sheet.paste(image, (left + column * (width + _MARGIN), top))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
