"""Statistics of the target undo damage that a corruption does, and harm where classes shift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.claims.charts import lines
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.parallel import share_out
from normlab.claims.trained import SETUP, accuracy, batches, fashion, trained
from normlab.claims.work import Work
from normlab.streams import stream
from normlab.surgery import adapt
from normlab.training import Replica

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "blur", "contrast", "noise"]

_LR = 0.1
_SAMPLES = (2, 8, 32, 128, 512)  # A perceptron has no variance of one sample.
_DEVIATION, _WIDTH, _CONTRAST = 0.3, 1.5, 0.3
_ONE_CLASS = "clean, one class"


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images from 0 to 1 with Gaussian noise on every pixel.

    >>> noise(torch.zeros(1, 1, 2, 2), torch.Generator()).amin() >= 0
    tensor(True)
    """
    return (x + _DEVIATION * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def blur(x: Tensor) -> Tensor:
    """Return images, (N, C, H, W), convolved with a Gaussian; their edges are repeated outside.

    >>> blur(torch.ones(1, 1, 8, 8)).allclose(torch.ones(1, 1, 8, 8))
    True
    """
    reach = round(3 * _WIDTH)
    window = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * _WIDTH**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, window, groups=x.shape[1])
    return F.conv2d(x, window.transpose(2, 3), groups=x.shape[1])


def contrast(x: Tensor) -> Tensor:
    """Return images whose pixels are nearer to the image's own mean.

    >>> contrast(torch.tensor([[[[0.0, 1.0]]]]))
    tensor([[[[0.3500, 0.6500]]]])
    """
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + _CONTRAST * (x - mean)


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    return share_out(work, _seen, work.folder)


def _seen(seed: int, folder: Path) -> list[Row]:
    test = fashion().indices["test"]
    labels = fashion().dataset.labels
    network = trained(folder, Replica("batch", _LR, seed))
    draws = stream(seed, "claims", "adaptation")
    order = test[torch.randperm(len(test), generator=draws)]
    # To look at, and to be right about, different halves.
    seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
    rows = [Row("clean", "accuracy", 0, accuracy(network, unseen))]
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "noise": partial(noise, generator=draws),
        "blur": blur,
        "contrast": contrast,
    }
    for name, change in changes.items():
        rows += _adapted(network, name, seen, unseen, change)
    # Images as they were, and of one class only.
    alike = seen[labels[seen] == seed % fashion().dataset.classes]
    rows += _adapted(network, _ONE_CLASS, alike, unseen, lambda x: x)
    return rows


def _adapted(
    network: torch.nn.Module,
    name: str,
    seen: Tensor,
    unseen: Tensor,
    change: Callable[[Tensor], Tensor],
) -> list[Row]:
    """Return the accuracy on changed images, without adaptation and after it to n of them."""
    rows = [Row(name, "accuracy", 0, accuracy(network, unseen, change))]
    for n in _SAMPLES:
        images = [change(x) for x in batches(seen[:n], n)]
        adapted, _ = adapt(network, iter(images))
        rows.append(Row(name, "accuracy", n, accuracy(adapted, unseen, change)))
    return rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    most = _SAMPLES[-1]
    wide = 100 * frame.pivot(index="seed", columns=["arm", "at"], values="value")
    gained = {
        f"{name}: accuracy adapted − not": (wide[name, most] - wide[name, 0]).tolist()
        for name in ("noise", "blur", "contrast")
    }
    harm = (wide[_ONE_CLASS, 0] - wide[_ONE_CLASS, most]).tolist()
    return {**gained, "one class: accuracy not adapted − adapted": harm}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    shown = frame[frame["arm"] != "clean"]
    return lines(
        shown,
        title="Test accuracy after adaptation to n images without labels",
        x="images (0: not adapted)",
        y="test accuracy",
        arms=[_ONE_CLASS, "noise", "blur", "contrast"],
        symlog_x=True,
    )


# One point: twice what studies here call a difference that does not matter.
_PARTS = tuple(
    Part(name, "more", 1.0, "points")
    for name in (
        *(f"{name}: accuracy adapted − not" for name in ("noise", "blur", "contrast")),
        "one class: accuracy not adapted − adapted",
    )
)

CLAIM = Claim(
    name="adaptation",
    statement="Batch norm's statistics taken from corrupted images, without labels, win accuracy "
    "back; taken from images of one class they lose it.",
    source="Schneider and others, 2020; Nado and others, 2020",
    metric="Test accuracy with statistics (1 − w)·training's + w·those of n images, w = n/(n + "
    "16), less that with training's own.",
    published="On ImageNet-C the mean corruption error of a ResNet-50, relative to AlexNet's "
    "errors, fell from 76.7% to 62.2%.",
    setup=f"{SETUP}, a rate of {_LR}. Half of the test images to adapt to, 512 of them where a "
    "verdict is made, and the other half to be right about. Noise of deviation "
    f"{_DEVIATION}, a Gaussian blur of {_WIDTH} pixels, contrast × {_CONTRAST}; one class, "
    "another one for every seed.",
    parts=_PARTS,
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement="Half of the test images hold about 500 of a class: 512 of one class are all of "
    "those.",
    is_cheap=True,
)
