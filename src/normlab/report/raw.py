"""Measurements in the compact form in which a page carries them."""

from __future__ import annotations

import json
import math
from typing import Any

from normlab.study import Comparison
from normlab.training import Replica

__all__ = ["raw"]


def raw(comparison: Comparison, *, name: str, room: int) -> dict[str, Any]:
    """Return what a page's script draws seeds from and makes tables of.

    Args:
        comparison: What to put into the page.
        name: Of the run.
        room: How many bytes all of it may take. Where all do not fit, those of the
            settings that are reported stand for them, and if these do not either, none.

    Returns:
        `run`, the name; `per_epoch`, steps; `replicas`, `Comparison.replicas` as columns;
        `left_out`, how many replicas' courses did not fit; and `courses`, one for each replica of
        which something was measured: its fields, `status`, whether its setting is the `reported`
        one, the seconds of a step (its own, or those of its arm), and its measurements: `step`,
        `epoch`, `time` (seconds since 1970) and `values` of each split and metric, in step.
    """
    courses = _courses(comparison)
    reported = [course for course in courses if course["reported"]]
    ends = comparison.replicas()
    replicas = {key: [_plain(x) for x in ends[key]] for key in ends}
    left = room - _size(replicas)
    candidates: tuple[list[dict[str, Any]], ...] = (courses, reported)
    fitting = next((kept for kept in candidates if _size(kept) <= left), [])
    return {
        "run": name,
        "per_epoch": comparison.steps_per_epoch,
        "replicas": replicas,
        "left_out": len(courses) - len(fitting),
        "courses": fitting,
    }


def _size(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")).encode())


def _courses(comparison: Comparison) -> list[dict[str, Any]]:
    reported, paces = comparison.reported, _paces(comparison)
    courses: dict[Replica, dict[str, Any]] = {}
    frame = comparison.frame()
    frame["time"] = frame["time"].astype("int64") / _per_second(frame)
    for row in frame.to_dict("records"):
        replica = Replica(row["arm"], row["lr"], row["seed"], row["weight_decay"])
        course = courses.setdefault(
            replica,
            {
                **replica._asdict(),
                "status": row["status"],
                "reported": reported[replica.arm] == replica.setting,
                "pace": paces.get(replica, paces.get(replica.arm)),
                "points": {},
            },
        )
        point = (row["step"], row["epoch"], row["time"])
        course["points"].setdefault(point, {})[row["split"], row["metric"]] = row["value"]
    return [_aligned(course) for course in courses.values()]


def _per_second(frame: Any) -> int:
    return {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[frame["time"].dt.unit]


def _paces(comparison: Comparison) -> dict[Any, float]:
    """Return the seconds of a step of each replica that ended, and their mean for its arm."""
    ends = comparison.replicas().query("step > 0")
    ends = ends.assign(pace=ends["seconds"] / ends["step"])
    paces: dict[Any, float] = dict(ends.groupby("arm")["pace"].mean())
    for row in ends.to_dict("records"):
        paces[Replica(row["arm"], row["lr"], row["seed"], row["weight_decay"])] = row["pace"]
    return paces


def _aligned(course: dict[str, Any]) -> dict[str, Any]:
    """Turn a dict by points into columns that keep step with each other."""
    points = course.pop("points")
    steps, epochs, times = zip(*points, strict=True)
    kinds = dict.fromkeys(kind for values in points.values() for kind in values)
    return {
        **course,
        "step": list(steps),
        "epoch": list(epochs),
        "time": list(times),
        "values": [
            {
                "split": split,
                "metric": metric,
                "value": [_plain(each.get((split, metric))) for each in points.values()],
            }
            for split, metric in kinds
        ],
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a number that is none is null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
