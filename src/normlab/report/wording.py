"""Numbers and verdicts in words."""

from __future__ import annotations

from normlab.report.published import published_sentence
from normlab.report.sensitivity import chosen_sentence, range_sentences
from normlab.study import Comparison, Metric, Verdict

__all__ = [
    "difference",
    "duration",
    "headline",
    "interval",
    "mean_and_sd",
    "remarks",
    "sentence",
    "word",
]


def difference(verdict: Verdict, *, unit: bool = True) -> str:
    """Return the mean difference, with or without its unit, or an empty text."""
    if verdict.difference is None:
        return ""
    number = verdict.metric.show(verdict.difference, signed=True)
    return f"{number} {verdict.metric.unit}" if unit else number


def interval(verdict: Verdict) -> str:
    """Return the interval without its unit, or an empty text."""
    if verdict.interval is None:
        return ""
    low, high = (verdict.metric.show(end, signed=True) for end in verdict.interval)
    return f"{low} to {high}"


def mean_and_sd(metric: Metric, summary: dict[str, float | None]) -> str:
    """Return an arm's mean and standard deviation over seeds, and what is not in them."""
    mean, sd, failed = summary["mean"], summary["sd"], summary["failed"]
    text = "–" if mean is None else metric.show(mean) + "%" * (metric.unit == "points")
    if sd is not None:
        text += f" ± {metric.show(sd)}"
    return text + (f" ({failed} failed)" if failed else "")


def word(verdict: Verdict) -> str:
    """Return the verdict in a word or two."""
    return verdict.verdict or "no verdict"


def sentence(verdict: Verdict) -> str:
    """Return a verdict as a sentence that can stand alone."""
    arm, baseline, label = verdict.arm, verdict.baseline, verdict.metric.label
    size = ""
    if verdict.difference is not None:
        size = f": {difference(verdict)}"
        if verdict.interval:
            size += (
                f" ({verdict.confidence * 100:g}% interval {interval(verdict)}; {verdict.n} seeds)"
            )
    margin = ""
    if verdict.equivalence_margin is not None:
        margin = f"±{verdict.metric.show(verdict.equivalence_margin)} {verdict.metric.unit}"
    text = {
        "better": f"{arm} is better than {baseline} on {label}{size}",
        "worse": f"{arm} is worse than {baseline} on {label}{size}",
        "equivalent": f"{arm} and {baseline} are equivalent on {label}, within {margin}{size}",
        "inconclusive": f"Whether {arm} differs from {baseline} on {label} is inconclusive{size}; "
        f"{_what_it_takes(verdict)}",
        None: f"{arm} against {baseline} on {label}{size}{_failures(verdict)}",
    }[verdict.verdict]
    return text + (f"; {verdict.reason}." if verdict.reason else ".")


def headline(comparison: Comparison) -> list[str]:
    """Return the answer: one sentence for each arm, on the first metric."""
    if comparison.frame().empty:
        done, all_ = len(comparison.replicas()), len(comparison.study.replicas)
        return [f"No measurements yet; {done} of {all_} replicas done."]
    first = comparison.metrics[0].name
    sentences = [sentence(one) for one in comparison.verdicts if one.metric.name == first]
    if not sentences:
        alone = [_alone(comparison)]
        if comparison.complete:
            return alone
        done, total = len(comparison.replicas()), len(comparison.study.replicas)
        return [*alone, f"{done} of {total} replicas are done."]
    return sentences


def _alone(comparison: Comparison) -> str:
    arm, metric = comparison.study.baseline, comparison.metrics[0]
    ours = comparison.summary()["arms"][arm][metric.name]
    seeds = ours["n"] + ours["failed"]
    size = (
        f", with {metric.label} {mean_and_sd(metric, ours)} over {seeds} seed{'s' * (seeds != 1)}"
    )
    return f"{arm} ran alone{size if seeds else ''}: a second arm would make a comparison."


def remarks(comparison: Comparison) -> list[str]:
    """Return what there is to say of published figures, learning rates, and the other verdicts."""
    first = comparison.metrics[0].name
    told = [published_sentence(comparison)] if comparison.study.published else []
    told += range_sentences(comparison)
    if chosen := chosen_sentence(comparison):
        told.append(chosen)
    return told + [
        sentence(one)
        for one in comparison.verdicts
        if one.metric.name != first and one.verdict and (one.reason or one.seeds_needed != 0)
    ]


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(75)
    '1 min 15 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _failures(verdict: Verdict) -> str:
    """Return how many replicas failed; nothing if none did."""
    ours, theirs = verdict.failed
    if not ours + theirs:
        return ""
    return (
        f"; {ours} of {verdict.n} replicas of {verdict.arm} and {theirs} of {verdict.baseline} "
        f"{verdict.metric.failure}"
    )


def _what_it_takes(verdict: Verdict) -> str:
    """Return what would decide it: a study of its own, since a second look has to be declared."""
    if verdict.seeds_needed is None:
        return "if things are as they look, no study of up to 1,000 seeds would decide it"
    return f"a new study with about {verdict.n + verdict.seeds_needed} seeds would decide it"
