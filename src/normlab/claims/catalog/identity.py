"""With γ = √(σ² + ε) and β = μ batch norm gives back what it got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from normlab.claims.charts import dots
from normlab.claims.claim import Claim, Part, Row
from normlab.claims.work import Work
from normlab.layers import BatchNorm2d
from normlab.streams import stream

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = ["CLAIM"]

_ERROR = "max |BN(x) − x| / max |x|"
_TYPES = {"float32": torch.float32, "float64": torch.float64}


def _measure(work: Work) -> Iterator[tuple[int, Iterable[Row]]]:
    for seed in work.seeds:
        yield seed, [Row(name, _ERROR, 0, _error(seed, dtype)) for name, dtype in _TYPES.items()]


def _error(seed: int, dtype: torch.dtype) -> float:
    generator = stream(seed, "claims", "identity")
    # Channels of quite different means and deviations.
    mean = 10 * torch.randn(32, generator=generator, dtype=torch.float64)
    deviation = torch.exp(torch.randn(32, generator=generator, dtype=torch.float64))
    x = torch.randn(64, 32, 8, 8, generator=generator, dtype=torch.float64)
    x = (x * deviation[:, None, None] + mean[:, None, None]).to(dtype)
    norm = BatchNorm2d(32, dtype=dtype)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    with torch.no_grad():
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)
        return float((norm(x) - x).abs().max() / x.abs().max())


def _effects(frame: pd.DataFrame) -> Mapping[str, Sequence[float]]:
    return {name: frame.loc[frame["arm"] == name, "value"].tolist() for name in _TYPES}


def _chart(frame: pd.DataFrame) -> alt.TopLevelMixin:
    title = "What is left between a layer's input and its output"
    return dots(frame, title=title, x=_ERROR, arms=list(_TYPES), log_x=True)


CLAIM = Claim(
    name="identity",
    statement="Batch norm can represent the identity: γ = √(σ² + ε) and β = μ restore its input.",
    source="Ioffe and Szegedy, 2015",
    metric=f"{_ERROR}, in training mode.",
    published="A formula, and no figure.",
    setup="A batch of 64 images of 32 channels, 8×8, whose means and deviations differ widely.",
    parts=(Part("float32", "exact", 1e-6), Part("float64", "exact", 1e-14)),
    measure=_measure,
    effects=_effects,
    chart=_chart,
    is_cheap=True,
)
