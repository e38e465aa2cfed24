"""What a conversion tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from normlab.surgery.kinds import parse

__all__ = ["ConversionReport"]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. Keys are qualified names of modules, "" for the model itself.

    Attributes:
        to: The kind that was asked for.
        replaced: What took a layer's place, and what it does: "BatchNorm2d + add + relu".
        unfused: Why a replaced layer does not do what follows it, where it could.
        skipped: Why a norm layer was left as it was.
        rewritten: Modules whose forward pass is now the code of a graph, with their class.
        restored: Modules that do again what a layer did for them, with their class: activations,
            and those whose forward pass is their class's again.
        kept: What a layer's kind has no room for, and is kept on it for the way back.
        returned: What came back as it was before an earlier conversion; running statistics among it
            may be stale, and `normlab.recalibrate` renews them.
        explained: By calibrated layer, the share of the variance of the old layer's output that its
            own explains, R².
        error: ‖new − old‖ / ‖old‖ of the model's outputs in eval mode, over the batches of
            `calibrate`, or else on `example`; None if there was neither.
        uncalibrated: The same before calibrating; None without `calibrate`.
    """

    to: str
    replaced: dict[str, str]
    unfused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rewritten: dict[str, str] = field(default_factory=dict)
    restored: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    returned: dict[str, str] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    uncalibrated: float | None = None

    def __str__(self) -> str:
        kind = parse(self.to)
        fused = sum("+" in what for what in self.replaced.values())
        head = f"{len(self.replaced)} {'batch ' if kind.is_batch else ''}norm layers replaced"
        if kind.follows:
            head += f", {fused} with what follows them"
        head += f"; {len(self.skipped)} left as they were"
        if kind.follows:
            head += f"; {len(self.rewritten)} forward passes rewritten"
        lines = [head]
        if self.uncalibrated is not None:
            lines.append(
                f"  outputs changed by {self.error:.2%}; by {self.uncalibrated:.2%} without "
                "calibrating"
            )
        elif self.error is not None:
            lines.append(f"  outputs changed by {self.error:.2%} on the example")
        for name, what in self.replaced.items():
            notes = [self.unfused[name]] if name in self.unfused else []
            if name in self.kept:
                notes.append(f"kept for the way back: {self.kept[name]}")
            if name in self.returned:
                stale = ", statistics perhaps stale" if "running" in self.returned[name] else ""
                notes.append(f"as before: {self.returned[name]}{stale}")
            if name in self.explained:
                notes.append(f"R² {self.explained[name]:.4f}")
            told = f" ({'; '.join(notes)})" if notes else ""
            lines.append(f"  {name or 'the model'}: {what}{told}")
        for found, word in (
            (self.skipped, "left, {}"),
            (self.rewritten, "forward pass of {} rewritten"),
            (self.restored, "{} again"),
        ):
            lines += [f"  {name or 'the model'}: {word.format(it)}" for name, it in found.items()]
        return "\n".join(lines)
