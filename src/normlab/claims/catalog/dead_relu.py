"""How many ReLUs are zero on every image, at the largest rate that trains and far below it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normlab.claims.catalog.max_learning_rate import accuracies, rates_that_train
from normlab.claims.charts import dots, scatter
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import contrast
from normlab.claims.parallel import share_out
from normlab.claims.setups import fashion_relu
from normlab.claims.work import Work
from normlab.data import gather, load, split
from normlab.kernels import BUILT
from normlab.probes import Units, outputs
from normlab.study import Study
from normlab.training import Engine, Fleet, Replica, build

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "dead_share"]

_ARMS = ("plain", "batch")
_FIRST, _SHARE = "share of dead units before training", "share of dead units after training"
_DIFFERENCE, _LEVEL = "share without batch norm − share with it", "share with batch norm"
_RISE = "share without batch norm − the same at a sixteenth of the rate"
_LOWER = 1 / 16  # Of the largest rate at which both train; what is usual for such a network.
_POINTS = 100


def dead_share(network: nn.Module, images: Tensor, scaling: str = "0..1") -> float:
    """Return the share of a network's ReLUs that are zero on each of some images, in eval mode.

    Args:
        network: Its `torch.nn.ReLU` layers are looked at; a unit is a channel.
        images: uint8, shape (N, C, H, W).
        scaling: As `normlab.data.scale` takes it.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 4)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    >>> network = nn.Sequential(nn.Flatten(), layer.requires_grad_(False), nn.ReLU())
    >>> layer.bias.zero_().shape
    torch.Size([4])
    >>> dead_share(network, torch.tensor([[[[0, 9]]], [[[0, 200]]]], dtype=torch.uint8))
    0.75
    """
    seen: dict[str, Units] = {}

    def see(name: str, layer: nn.Module, output: Tensor) -> None:
        if isinstance(layer, nn.ReLU):
            seen.setdefault(name, Units("relu")).see(output)

    network.eval()
    with torch.no_grad(), outputs(network, see):
        for batch in torch.arange(len(images)).split(2000):
            network(gather(images, batch, scaling))
    silent = torch.cat([units.silent for units in seen.values()])
    return float(silent.double().mean())


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    study = fashion_relu(work.quick)
    found = accuracies(work.compare(study))
    common = {
        seed: max(
            set.intersection(*(set(rates_that_train(found[arm, seed])) for arm in _ARMS)),
            default=math.nan,
        )
        for seed in work.seeds
    }
    yield from share_out(work, _shares, study, common)


def _shares(seed: int, study: Study, common: Mapping[int, float]) -> list[Row]:
    """Train the arms of a seed at its rate and at a lower one, and count dead units."""
    rate = common[seed]
    if math.isnan(rate):
        return [Row(arm, _SHARE, rate, math.nan) for arm in _ARMS]
    splits, rows = split(load(study.dataset, progress=False), study.validation), []
    images = splits.dataset.images[splits.indices["test"]]
    for arm in _ARMS:
        replicas = [Replica(arm, each, seed) for each in (rate * _LOWER, rate)]
        networks = [build(study, arm, seed, splits.dataset) for _ in replicas]
        rows.append(Row(arm, _FIRST, 0, dead_share(networks[0], images, study.scaling)))
        engine = Engine("looped", "native" if BUILT else "traced")
        fleet = Fleet(networks, replicas, study, splits, engine)
        fleet.advance(study.epochs * fleet.steps_per_epoch)
        for i, (network, replica) in enumerate(zip(networks, replicas, strict=True)):
            network.load_state_dict(fleet.state(i))
            rows.append(Row(arm, _SHARE, replica.lr, dead_share(network, images, study.scaling)))
    return rows


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    frame = frame[frame["quantity"] == _SHARE].sort_values("at")

    def points(arm: str, place: int) -> list[float]:
        groups = frame[frame["arm"] == arm].groupby("seed")["value"]
        return [_POINTS * float(values.iloc[place]) for _, values in groups]

    plain, batch = (points(arm, -1) for arm in _ARMS)
    return {
        _DIFFERENCE: contrast(plain, batch),
        _LEVEL: batch,
        _RISE: contrast(plain, points("plain", 0)),
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    import altair as alt

    first, after = (frame[frame["quantity"] == each] for each in (_FIRST, _SHARE))
    title = "Units that are zero on all of 10,000 test images, before training"
    return alt.vconcat(
        dots(first, title=title, x=_FIRST, arms=_ARMS),
        scatter(
            after,
            title="The same after training at the largest common rate, and at a sixteenth of it",
            x="learning rate",
            y=_SHARE,
            arms=_ARMS,
            log_x=True,
        ),
    )


# One unit in twenty: with fewer of them dead a network is as good as one a little narrower, and
# nobody would see the difference.
_MARGIN = 5.0

CLAIM = Claim(
    name="dead-relu",
    statement="At large learning rates many ReLUs of a plain network are dead, and those of a "
    "network with batch norm are alive.",
    source="Widely said",
    metric=f"{_SHARE}: of all hidden units those that are zero on each of 10,000 test images, in "
    "eval mode, after training at the largest rate at which both arms train, as max-learning-rate "
    "has it; and without batch norm at a sixteenth of that rate too. In points.",
    published="None.",
    setup="Fashion-MNIST, 55,000 training images, a perceptron of 4×128 ReLUs, batch 128, SGD, "
    "rates 1/16, 1/8, … 32, five epochs. Shown too: before training. Quick: 15,000 images and two "
    "epochs.",
    parts=(
        Part(_DIFFERENCE, "more", _MARGIN, "points"),
        Part(_LEVEL, "equal", _MARGIN, "points"),
        # Units that are as often dead at a small rate, too, are not killed by a large one.
        Part(_RISE, "more", _MARGIN, "points"),
    ),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement="Units can be dead before the first step: of torch's own first weights, which "
    "these networks begin with, the figure shows how many. The third part was declared after a "
    "quick run and before the full one: the first two had not asked whether the rate is the cause.",
)
