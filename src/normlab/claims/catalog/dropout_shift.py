"""Dropout before batch norm: another variance in evaluation than in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.claims.charts import dots
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.effects import contrast, of_arm
from normlab.claims.parallel import share_out
from normlab.claims.trained import FASHION, SETUP, accuracy, batches, fashion, perceptron, trained
from normlab.claims.work import Work
from normlab.layers import Dropout
from normlab.streams import stream
from normlab.study.outcomes import choose
from normlab.surgery import recalibrate
from normlab.training import Replica, Setting

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM", "variances"]

_RATES = (0.03, 0.1, 0.3)
_P = 0.5
_SHOWN = 10_000
_BEFORE, _AFTER = f"batch+dropout:{_P}", "dropout after the last batch norm"
_SHIFT = "mean log₂(Var_train / Var_eval)"
_AS_IS, _CHOICE = "accuracy", "validation"
_WITH, _WITHOUT = "accuracy, statistics with dropout", "accuracy, statistics without dropout"


def _built(arm: str, seed: int) -> nn.Module:
    if arm == _BEFORE:
        return perceptron(arm, seed)
    network = perceptron("batch", seed)
    last = network.get_submodule(f"hidden{FASHION.network.count(',')}")
    last.add_module("dropout", Dropout(_P))
    return network


@torch.no_grad()
def variances(network: nn.Module, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the variance of what each batch norm gets, per channel, in float64, as (C,).

    Args:
        network: In the mode in which it is to be seen; its layers get (N, C).
        images: Batches.

    >>> network = nn.Sequential(nn.BatchNorm1d(1)).eval()
    >>> variances(network, [torch.tensor([[1.0]]), torch.tensor([[3.0]])])
    {'0': tensor([1.], dtype=torch.float64)}
    """
    got: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: got.setdefault(name, []).append(inputs[0].double())
        )
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        for x in images:
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(each).var(0, correction=0) for name, each in got.items()}


def _shift(training: nn.Module, images: Tensor) -> float:
    """Return how much larger the variance is in training, behind a dropout: mean of log₂.

    Args:
        training: With the statistics of training, dropout included; in eval mode.
        images: To see the variance of evaluation on.
    """
    evaluated = variances(training, images.split(1000))
    norms = {name: m for name, m in training.named_modules() if name in evaluated}
    ratios = [
        torch.log2(norm.running_var.double() / evaluated[name]).mean()
        for name, norm in list(norms.items())[1:]  # Before the first there is no dropout.
        if isinstance(norm.running_var, Tensor)
    ]
    return float(torch.stack(ratios).mean())


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    return share_out(work, _seen, work.folder)


def _seen(seed: int, folder: Path) -> list[Row]:
    indices = fashion().indices
    draw = torch.randperm(len(indices["train"]), generator=stream(seed, "claims", "dropout"))
    some = indices["train"][draw[:_SHOWN]]
    rows = []
    for arm in (_BEFORE, _AFTER):
        for lr in _RATES:
            network = trained(folder, Replica(arm, lr, seed), _built)
            rows.append(Row(arm, _CHOICE, lr, accuracy(network, indices["validation"])))
            rows.append(Row(arm, _AS_IS, lr, accuracy(network, indices["test"])))
            if arm == _BEFORE:
                images = torch.cat(list(batches(some, 1000)))
                # Both estimated anew, so that the average of training plays no part.
                of_training, of_evaluation = (
                    recalibrate(network, iter(images.split(FASHION.batch_size)), dropout=drops)
                    for drops in (True, False)
                )
                rows.append(Row(arm, _SHIFT, lr, _shift(of_training[0], images)))
                for name, (each, _) in ((_WITH, of_training), (_WITHOUT, of_evaluation)):
                    rows.append(Row(arm, name, lr, accuracy(each, indices["test"])))
    return rows


def _chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what each arm and seed has at the rate that is best by its other seeds."""
    seeds = sorted(frame["seed"].unique())
    # One that diverged has no accuracy, and is never chosen.
    validation = frame[frame["quantity"] == _CHOICE].dropna()
    finals = {(one.arm, one.at, one.seed, 0.0): one.value for one in validation.itertuples()}
    kept = {
        (arm, seed, setting.lr)
        for arm in frame["arm"].unique()
        for seed, setting in choose(finals, arm, list(map(Setting, _RATES)), seeds).items()
    }
    keys = zip(frame["arm"], frame["seed"], frame["at"], strict=True)
    return frame[[key in kept for key in keys]]


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    chosen = _chosen(frame)

    def of(arm: str, quantity: str) -> list[float]:
        return of_arm(chosen, arm, quantity)

    numbers = (
        of(_BEFORE, _SHIFT),
        contrast(of(_BEFORE, _WITHOUT), of(_BEFORE, _WITH)),
        contrast(of(_AFTER, _AS_IS), of(_BEFORE, _AS_IS)),
    )
    scales = (1, 100, 100)
    return {
        part.name: [scale * each for each in some]
        for part, some, scale in zip(_PARTS, numbers, scales, strict=True)
    }


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    chosen = _chosen(frame)
    shown = chosen[chosen["quantity"].isin([_AS_IS, _WITH, _WITHOUT])].copy()
    names = {
        (_BEFORE, _AS_IS): "dropout before each",
        (_BEFORE, _WITH): "the same, statistics of 10,000 images",
        (_BEFORE, _WITHOUT): "the same, and without dropout",
        (_AFTER, _AS_IS): "dropout after the last",
    }
    keys = zip(shown["arm"], shown["quantity"], strict=True)
    shown["arm"] = [names[key] for key in keys]
    return dots(
        shown,
        title="Dropout before batch norms, and after the last of them",
        x="test accuracy",
        arms=list(names.values()),
    )


_PARTS = (
    # A tenth of a doubling is 7% in variance; less is lost in the noise of a batch of 128.
    Part(_SHIFT, "more", 0.1, "doublings"),
    # Half a point, as in the studies here.
    Part("accuracy, statistics without dropout − with", "more", 0.5, "points"),
    Part("accuracy, dropout after the last − before each", "more", 0.5, "points"),
)

CLAIM = Claim(
    name="dropout-shift",
    statement="Dropout before batch norm gives it another variance in training than in "
    "evaluation, and that costs accuracy.",
    source="Li and others, 2019",
    metric="log₂ of the variance of what a batch norm gets in training (dropout on, statistics of "
    "the batch) over that in evaluation; test accuracy with statistics estimated anew without "
    "dropout, less that with it; test accuracy of a network whose one dropout stands after the "
    "last batch norm, less that with dropout before each.",
    published="Accuracy fell from 77.4% to 68.6% with dropout before batch norm.",
    setup=f"{SETUP}, rates {', '.join(map(str, _RATES))}, each arm at the one that is best on "
    f"validation images by the other seeds. Dropout of {_P} after every ReLU, and so before the "
    "linear layer and batch norm that follow; statistics from 10,000 training images.",
    parts=_PARTS,
    measure=_measure,
    effects=_effects,
    chart=_chart,
    disagreement="What the variance costs is told by the second part. The third compares four "
    "dropouts with one, so that not their place alone is another; and rates end at "
    f"{_RATES[-1]}, which may be too small for one of the two.",
    is_cheap=True,
)
