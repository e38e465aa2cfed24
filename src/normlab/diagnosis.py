"""The doctor: measure a model, say what is wrong with its batch norms, mend what can be mended."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normlab import doctor
from normlab import report as reports

if TYPE_CHECKING:
    import altair as alt

    from normlab.doctor.observe import Loss
    from normlab.surgery.models import Forward

__all__ = ["Diagnosis", "diagnose"]


class Diagnosis(doctor.Diagnosis):
    """What `diagnose` found, with the means to draw it and to mend the model."""

    def chart(self) -> alt.TopLevelMixin:
        """Return a chart: running against true statistics layer by layer, γ, and dead units."""
        return reports.diagnosis_chart(self)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file that works offline, and return its path.

        Raises:
            NormlabError: It cannot be written.
        """
        return reports.write_diagnosis(self, Path(path))

    def fixed(self, batches: Iterable[Any] | None = None) -> doctor.Fixed:
        """Mend a copy of the model where nothing that it learned is changed, and diagnose it.

        Momentum that is meant the other way round is turned, and running statistics that are stale,
        never updated or not finite are estimated anew, by `normlab.recalibrate`. What else was
        found is left to you: it needs training.

        Args:
            batches: To estimate by; those of the diagnosis if none are given.

        Raises:
            InputError: The batches of the diagnosis were an iterator, and are used up.
        """
        return doctor.mend(self, batches)

    def _repr_html_(self) -> str:
        import vl_convert

        picture = vl_convert.vegalite_to_svg(self.chart().to_dict())
        return f"<p>{self.summary}</p>{reports.findings_html(self)}{picture}"


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int | None = None,
    reference: Iterable[Any] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Diagnosis:
    """Measure what goes wrong with the batch norms of a model, without changing a bit of it.

    A copy of the model is run on each batch twice: as in evaluation, and with its batch norms
    normalizing by the batch; and where dropout stands before a batch norm, once more with dropout.
    The first batch is also run in part, and backward. A signal that the arguments do not allow is
    listed in `not_measured`, with what it would need. Batches should be as large as those of
    training, and mixed as they are; 1,000 samples or more make a diagnosis.

    Args:
        model: Of torch's batch norms, normlab's, timm's or others that are instances of torch's.
            In the mode in which it is trained, if its layers' modes matter. Names are of what a
            data-parallel wrapper wraps, and fixes reach it as `model.module`.
        batches: Tensors; tuples or lists, of which the model gets the first and the second are the
            labels; or mappings, which it gets by keywords, with the labels under "labels", "label",
            "y" or "target".
        loss: Takes the model's output and the labels and returns a scalar; cross-entropy where
            labels are classes and the output has the shape (N, C).
        optimizer: The model's, to see its weight decay.
        steps: That it took so far.
        reference: Batches of the domain that the model was trained on, of the size of the others,
            8 or more, to tell a shift of domain.
        forward: Runs the model on any other batch: `lambda model, batch: model(batch["image"])`.
        device: What tensors in a batch are moved to.

    Returns:
        The diagnosis; it prints.

    Raises:
        InputError: The model has no batch norms, there are no batches, what yields them raises, one
            is on another device or not of a shape that the model takes.

    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, momentum=0.99))
    >>> batch = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> diagnose(model, [batch, batch]).frame()[["signal", "layer", "measured"]]
                    signal layer  measured
    0  momentum convention     1      0.99
    """
    found = doctor.diagnose(
        model,
        batches,
        loss=loss,
        optimizer=optimizer,
        steps=steps,
        reference=reference,
        forward=forward,
        device=device,
    )
    return Diagnosis(**vars(found))
