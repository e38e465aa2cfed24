"""What replicas ended with: what arms are judged by, and what settings are chosen by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from normlab.study.declaration import Study
from normlab.study.verdicts import Metric
from normlab.training import Replica, Setting

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["choose", "metrics_of", "outcome_table", "replica_of", "summarize", "validation_finals"]


def replica_of(row: Mapping[str, Any]) -> Replica:
    """Return the replica that a row of the ledger is of."""
    return Replica(*(row[name] for name in Replica._fields))


def metrics_of(study: Study) -> list[Metric]:
    """Return the numbers that a study's arms are judged by, the first of them the answer.

    >>> [metric.name for metric in metrics_of(Study(validation=0))]
    ['final_test_accuracy', 'final_test_loss', 'steps_to_target']
    """
    target = f"{study.target_accuracy * 100:g}%"
    metrics = [
        Metric("final_test_accuracy", "final test accuracy", True, study.margin_accuracy, "points"),
        Metric("final_test_loss", "final test loss", False, study.margin_loss, "nats"),
        Metric(
            "steps_to_target",
            f"steps to {target} test accuracy",
            False,
            None,
            "steps",
            failure=f"diverged or did not reach {target}",
        ),
    ]
    if study.validation:
        best = Metric(
            "best_validation_test_accuracy",
            "test accuracy at the best validation epoch",
            True,
            study.margin_accuracy,
            "points",
        )
        metrics.insert(2, best)
    return metrics


def outcome_table(
    study: Study, replicas: Sequence[Mapping[str, Any]], measurements: Iterable[Mapping[str, Any]]
) -> pd.DataFrame:
    """Return what each replica ended with.

    Args:
        study: What was declared.
        replicas: The ledger's rows of outcomes.
        measurements: Its rows of measurements, ordered by step within a replica, split and metric.

    Returns:
        Index as `Replica`, sorted; columns `status`, the final accuracy on training and validation
        images, and one for each of `metrics_of`. NaN where a replica diverged, did not reach the
        target or has no such images.
    """
    import pandas as pd

    courses: dict[Replica, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for m in measurements:
        course = courses.setdefault(replica_of(m), {})
        course.setdefault((m["split"], m["metric"]), []).append((m["step"], m["value"]))
    rows = []
    for row in replicas:
        replica, status = replica_of(row), row["status"]
        numbers = _numbers(courses[replica], study) if status == "done" else {}
        rows.append({**replica._asdict(), "status": status, **numbers})
    names = [metric.name for metric in metrics_of(study)]
    columns = ["status", "final_train_accuracy", "final_validation_accuracy", *names]
    index = list(Replica._fields)
    return pd.DataFrame(rows, columns=[*index, *columns]).set_index(index).sort_index()


def _numbers(
    course: Mapping[tuple[str, str], list[tuple[int, float]]], study: Study
) -> dict[str, float]:
    accuracy = course["test", "accuracy"]
    reached = [step for step, value in accuracy if value >= study.target_accuracy]
    numbers = {
        "final_test_accuracy": accuracy[-1][1],
        "final_test_loss": course["test", "loss"][-1][1],
        "steps_to_target": float(reached[0]) if reached else math.nan,
    }
    if train := course.get(("train", "accuracy")):
        numbers["final_train_accuracy"] = train[-1][1]
    if validation := course.get(("validation", "accuracy")):
        best = max(range(len(validation)), key=lambda i: validation[i][1])
        numbers["best_validation_test_accuracy"] = accuracy[best][1]
        numbers["final_validation_accuracy"] = validation[-1][1]
    return numbers


def validation_finals(table: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    """Return what settings are chosen by: final validation accuracies, 0 where one diverged."""
    return dict(zip(table.index, table["final_validation_accuracy"].fillna(0.0), strict=True))


def choose(
    finals: Mapping[tuple[Any, ...], float],
    arm: str,
    settings: Sequence[Setting],
    seeds: Sequence[int],
) -> dict[int, Setting]:
    """Choose an arm's setting for each seed by its other seeds: none chooses what it reports.

    Args:
        finals: Each replica's final validation accuracy, 0 for one that diverged; without
            validation data it may be empty.
        arm: Whose.
        settings: To choose from; the first of equals is taken.
        seeds: Finished at every setting.

    Returns:
        For each seed the setting with the best sum over the others.

    >>> scores = {0.1: [0.9, 0.9, 0.9], 0.2: [1.0, 0.85, 0.9]}
    >>> finals = {("batch", lr, i, 0.0): x for lr, row in scores.items() for i, x in enumerate(row)}
    >>> chosen = choose(finals, "batch", [Setting(0.1), Setting(0.2)], [0, 1, 2])
    >>> [setting.lr for setting in chosen.values()]
    [0.1, 0.2, 0.2]
    """
    scores = {
        one: np.array([finals.get((arm, one.lr, seed, one.weight_decay), 0.0) for seed in seeds])
        for one in settings
    }
    return {
        seed: max(scores, key=lambda one: scores[one].sum() - scores[one][i])
        for i, seed in enumerate(seeds)
    }


def summarize(outcomes: pd.DataFrame, arm: str, metric: str) -> dict[str, Any]:
    """Return an arm's mean and standard deviation of a metric, and how many are not in them.

    Args:
        outcomes: As `Comparison.outcomes`.
        arm: Whose.
        metric: Which.
    """
    if arm not in outcomes.index.get_level_values("arm"):
        return {"mean": None, "sd": None, "n": 0, "failed": 0, "diverged": 0}
    rows = outcomes.loc[[arm]]
    values = rows[metric].dropna()
    return {
        "mean": float(values.mean()) if len(values) else None,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "failed": len(rows) - len(values),
        "diverged": int((rows["status"] == "diverged").sum()),
    }
