"""A comparison: what a study's ledger says, read from the ledger alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normlab.errors import InputError
from normlab.statistics import mean_interval
from normlab.study.declaration import Study
from normlab.study.inspection import histograms_frame, layers_frame, learned_frame, probes_frame
from normlab.study.ledger import Ledger
from normlab.study.published import beside
from normlab.study.verdicts import Metric, Verdict, judge
from normlab.training import Replica, Setting

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison"]

_REPLICA = list(Replica._fields)


class Comparison:
    """Curves, paired differences and verdicts of one study.

    Attributes:
        study: What was declared.
        folder: Where the ledger is.
        sessions: One dict for each time that something was measured: `started`, `seconds`,
            `workers`, `versions` and `machine` (the last two as JSON).
    """

    def __init__(self, folder: str | Path) -> None:
        """Read a run.

        Args:
            folder: Holds `ledger.sqlite`.

        Raises:
            InputError: There is no ledger.
            LedgerError: It is damaged.
        """
        self.folder = Path(folder)
        with Ledger.read(self.folder) as ledger:
            self.study: Study = ledger.study
            self.sessions = ledger.rows("session")
            self._replicas = ledger.rows("replica")
            self._measurements = ledger.rows("measurement")
            self._layers = ledger.rows("layer")
            self._learned = ledger.rows("learned")
            self._engines = {arm: str(one.engine) for arm, one in ledger.choices().items()}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that were spent on measuring, over all sessions."""
        return float(sum(session["seconds"] for session in self.sessions))

    @property
    def started(self) -> float:
        """When measuring began, in seconds since 1970."""
        return datetime.fromisoformat(self.sessions[0]["started"]).timestamp()

    @property
    def complete(self) -> bool:
        """Whether every replica that the study declares has an outcome."""
        return len(self._replicas) == len(self.study.replicas)

    @cached_property
    def metrics(self) -> list[Metric]:
        """The numbers that the arms are judged by."""
        study = self.study
        target = f"{study.target_accuracy * 100:g}%"
        metrics = [
            Metric(
                "final_test_accuracy", "final test accuracy", True, study.margin_accuracy, "points"
            ),
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

    def frame(self) -> pd.DataFrame:
        """Return every measurement, one a row.

        Returns:
            Columns `arm`, `lr`, `seed`, `weight_decay`, `step`, `epoch`, `split`, `metric`,
            `value`, `time` (UTC), and `status` (`done`, `diverged`, or `running` where the replica
            has no outcome yet).
        """
        import pandas as pd

        columns = [*_REPLICA, "step", "epoch", "split", "metric", "value", "time"]
        frame = pd.DataFrame(self._measurements, columns=columns)
        times = pd.to_datetime(frame["time"].astype(float), unit="s", utc=True)
        frame["time"] = times.dt.round("ms")
        replicas = pd.DataFrame(self._replicas, columns=[*_REPLICA, "status"])
        merged = frame.merge(replicas, how="left", on=_REPLICA)
        return merged.assign(status=merged["status"].fillna("running"))

    def replicas(self) -> pd.DataFrame:
        """Return what each replica that has an outcome ended with, one a row.

        Unlike `outcomes`, of every learning rate, every weight decay and every seed.

        Returns:
            Columns `arm`, `lr`, `seed`, `weight_decay`, `status` (`done` or `diverged`), `step`
            (the last one), `seconds` (it took), `engine`, `final_validation_accuracy` and one for
            each of `metrics`, NaN as in `outcomes`.
        """
        import pandas as pd

        frame = pd.DataFrame(self._replicas, columns=[*_REPLICA, "status", "step", "seconds"])
        frame["engine"] = frame["arm"].map(self._engines)
        ends = self._outcome_table.drop(columns="status").reset_index()
        return frame.merge(ends, how="left", on=_REPLICA)

    def curves(self, metric: str = "accuracy") -> pd.DataFrame:
        """Return the course of a metric, averaged over the seeds that finished.

        Args:
            metric: `accuracy` or `loss`.

        Returns:
            Columns `arm`, `lr`, `weight_decay`, `split`, `step`, `epoch`, `mean`, `low`, `high`,
            `n` and `diverged`, the number of runs that did and are not in the mean. `low` and
            `high` are pointwise intervals of the mean at the study's confidence: each holds for its
            own point, and a whole curve leaves its band somewhere far more often.

        Raises:
            InputError: The metric was not measured.
        """
        import pandas as pd

        frame = self.frame()
        if metric not in set(frame["metric"]) and len(frame):
            known = ", ".join(sorted(set(frame["metric"])))
            raise InputError(f"{metric!r} was not measured: known are {known}")
        diverged = self.diverged()
        rows = []
        done = frame[(frame["metric"] == metric) & (frame["status"] == "done")]
        keys = ["arm", "lr", "weight_decay", "split", "step", "epoch"]
        for key, group in done.groupby(keys, sort=False):
            mean, low, high = mean_interval(group["value"], confidence=self.study.confidence)
            row = dict(zip(keys, key, strict=True))
            row.update(mean=float(mean), low=float(low), high=float(high), n=len(group))
            rows.append({**row, "diverged": diverged[key[0], Setting(*key[1:3])]})
        curves = pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n", "diverged"])
        curves.attrs["band"] = f"pointwise {self.study.confidence * 100:g}% t interval of the mean"
        return curves

    def learned(self) -> pd.DataFrame:
        """Return what the norm layers of each finished run held at its end, a channel a row.

        Returns:
            Columns `arm`, `lr`, `seed`, `weight_decay`, `layer`, `name` (`weight`, which is γ,
            `bias`, β, `running_mean` or `running_var`), `channel` and `value`.
        """
        return learned_frame(self._learned)

    def histograms(self) -> pd.DataFrame:
        """Return the histograms of values inside each network after each epoch, one tensor a row.

        They are those of the network in eval mode on 128 training images, evenly spaced among all,
        and are read from the ledger when asked for.

        Returns:
            Columns `arm`, `lr`, `seed`, `weight_decay`, `step`, `epoch`, `layer`, `name` (`output`
            of any layer; `weight`, which is γ, or `bias`, β, of a norm layer), `low` and `high`
            (the least and the largest finite value) and `counts` (a list: values in each of 30
            bins of equal width from `low` to `high`).

        Raises:
            InputError: The ledger is gone.
            LedgerError: It is damaged.
        """
        with Ledger.read(self.folder) as ledger:
            return histograms_frame(ledger.rows("histogram"))

    def probes(self) -> pd.DataFrame:
        """Return what the study's probes read inside every replica, one number a row.

        They are read from the ledger when asked for. What was not a finite number is not there.

        Returns:
            Columns `arm`, `lr`, `weight_decay`, `seed`, `step`, `epoch`, `probe` (a key of
            `normlab.probes.PROBES`), `layer` (empty for the whole network), `name` and `value`, of
            which the probe's own text has the formula.

        Raises:
            InputError: The ledger is gone.
            LedgerError: It is damaged.
        """
        with Ledger.read(self.folder) as ledger:
            return probes_frame(ledger.rows("probe"))

    def layers(self) -> pd.DataFrame:
        """Return the layers of each arm's network, and what its norms learned at what they report.

        Returns:
            Columns `arm`, `layer`, `kind`, `shape` (of what it makes of one sample), `parameters`;
            and for `weight` and `bias` each `_mean`, `_low` and `_high`: the mean, the least and
            the largest over channels and seeds, NaN where there is none.
        """
        learned = self.learned()
        kept = {(arm, *setting) for arm, setting in self.reported.items()}
        keys = zip(learned["arm"], learned["lr"], learned["weight_decay"], strict=True)
        reported = learned.loc[[key in kept for key in keys]]
        return layers_frame(self.study.arms, self._layers, reported)

    def diverged(self) -> Counter[tuple[str, Setting]]:
        """Return how many replicas of each arm and setting diverged."""
        gone = (_replica(one) for one in self._replicas if one["status"] == "diverged")
        return Counter((one.arm, one.setting) for one in gone)

    @cached_property
    def chosen(self) -> dict[str, dict[int, Setting]]:
        """The learning rate and weight decay at which each arm is reported, seed by seed.

        With several, a seed's are those with the best mean final validation accuracy over the
        other seeds, so no seed chooses what it is reported at. A diverged run counts as accuracy 0
        there. Only seeds that are finished at every setting, in every arm, are in it.
        """
        seeds = self._finished_seeds()
        finals = self._outcome_table["final_validation_accuracy"].fillna(0.0)
        chosen: dict[str, dict[int, Setting]] = {}
        for arm in self.study.arms:
            scores = {
                setting: np.array(
                    [
                        finals.get(Replica(arm, setting.lr, seed, setting.weight_decay), 0.0)
                        for seed in seeds
                    ]
                )
                for setting in self.study.settings
            }
            chosen[arm] = {
                seed: max(scores, key=lambda one: scores[one].sum() - scores[one][i])
                for i, seed in enumerate(seeds)
            }
        return chosen

    @property
    def reported(self) -> dict[str, Setting]:
        """The setting whose curves stand for each arm: the one most seeds are reported at."""
        settings = self.study.settings
        return {
            arm: max(settings, key=list(chosen.values()).count)
            for arm, chosen in self.chosen.items()
        }

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, 0 before the first one ended."""
        last = max(self._measurements, key=lambda m: (m["epoch"], -m["step"]), default=None)
        return last["step"] // last["epoch"] if last and last["epoch"] else 0

    def outcomes(self) -> pd.DataFrame:
        """Return what each run ended with, at its arm's learning rate and weight decay.

        Returns:
            Index `arm`, `seed`; columns `lr`, `weight_decay`, `status` and one for each of
            `metrics`, NaN for a run that diverged or did not reach the target. Only seeds that
            every arm finished.
        """
        import pandas as pd

        rows = []
        records = self._outcome_table.to_dict("index")
        for arm, settings in self.chosen.items():
            for seed, setting in settings.items():
                record = records[arm, setting.lr, seed, setting.weight_decay]
                rows.append({"arm": arm, "seed": seed} | setting._asdict() | record)
        columns = ["lr", "weight_decay", "status", *(metric.name for metric in self.metrics)]
        frame = pd.DataFrame(rows, columns=["arm", "seed", *columns])
        return frame.set_index(["arm", "seed"])

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Every arm against the baseline, for each of `metrics`.

        A study that is not complete gets no verdict: looking before the end, and stopping when one
        likes what one sees, finds differences where there are none.
        """
        outcomes = self.outcomes()
        verdicts: list[Verdict] = []
        for metric in self.metrics:
            values = {
                arm: outcomes.loc[[arm], metric.name].to_numpy(dtype=float)
                if arm in outcomes.index.get_level_values("arm")
                else np.zeros(0)
                for arm in self.study.arms
            }
            verdicts += judge(metric, values, self.study.baseline, self.study.confidence)
        if self.complete:
            return verdicts
        done, total = len(self._replicas), len(self.study.replicas)
        reason = f"no verdict before the study is complete: {done} of {total} replicas are done"
        # No p either: a test that was looked at early is no longer the test it was.
        return [
            replace(
                verdict,
                p=None,
                p_holm=None,
                p_sign_flip=None,
                p_equivalence=None,
                verdict=None,
                reason=reason,
                seeds_needed=None,
            )
            for verdict in verdicts
        ]

    def summary(self) -> dict[str, Any]:
        """Return everything that matters as plain dicts and lists, ready for JSON."""
        outcomes = self.outcomes()
        return {
            "study": self.study.model_dump(mode="json"),
            "run": str(self.folder),
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
            "arms": {
                arm: {
                    metric.name: _summarize(outcomes, arm, metric.name) for metric in self.metrics
                }
                for arm in self.study.arms
            },
            "chosen": {
                arm: {str(seed): setting._asdict() for seed, setting in settings.items()}
                for arm, settings in self.chosen.items()
            },
            "verdicts": [_verdict_dict(verdict) for verdict in self.verdicts],
            "published": self.published,
        }

    @cached_property
    def published(self) -> list[dict[str, Any]]:
        """What the text printed, beside what was measured here; as `published.beside` has it."""
        epoch, chosen = self.steps_per_epoch, self.chosen
        measured: dict[tuple[str, str, str, int, int], dict[int, float]] = {}
        for m in self._measurements:
            replica = _replica(m)
            if chosen.get(replica.arm, {}).get(replica.seed) == replica.setting:
                into = m["step"] - m["epoch"] * epoch
                key = (replica.arm, m["split"], m["metric"], m["epoch"], into)
                measured.setdefault(key, {})[replica.seed] = m["value"]
        return beside(self.study.published, measured, self.study.confidence)

    def _finished_seeds(self) -> list[int]:
        finished = {_replica(one) for one in self._replicas}
        unfinished = {one.seed for one in self.study.replicas if one not in finished}
        return [seed for seed in self.study.seeds if seed not in unfinished]

    @cached_property
    def _outcome_table(self) -> pd.DataFrame:
        """What each replica ended with: index as `Replica`; NaN where it failed."""
        import pandas as pd

        courses: dict[Replica, dict[tuple[str, str], list[tuple[int, float]]]] = {}
        for m in self._measurements:  # Ordered by step within each replica, split and metric.
            course = courses.setdefault(_replica(m), {})
            course.setdefault((m["split"], m["metric"]), []).append((m["step"], m["value"]))
        rows = []
        for row in self._replicas:
            replica, status = _replica(row), row["status"]
            numbers = self._numbers(courses[replica]) if status == "done" else {}
            rows.append({**replica._asdict(), "status": status, **numbers})
        columns = ["status", "final_validation_accuracy", *(one.name for one in self.metrics)]
        frame = pd.DataFrame(rows, columns=[*_REPLICA, *columns])
        return frame.set_index(_REPLICA).sort_index()

    def _numbers(self, course: dict[tuple[str, str], list[tuple[int, float]]]) -> dict[str, float]:
        accuracy = course["test", "accuracy"]
        reached = [step for step, value in accuracy if value >= self.study.target_accuracy]
        numbers = {
            "final_test_accuracy": accuracy[-1][1],
            "final_test_loss": course["test", "loss"][-1][1],
            "steps_to_target": float(reached[0]) if reached else math.nan,
        }
        if validation := course.get(("validation", "accuracy")):
            best = max(range(len(validation)), key=lambda i: validation[i][1])
            numbers["best_validation_test_accuracy"] = accuracy[best][1]
            numbers["final_validation_accuracy"] = validation[-1][1]
        return numbers


def _replica(row: dict[str, Any]) -> Replica:
    """Return the replica that a row of the ledger is of."""
    return Replica(*(row[name] for name in _REPLICA))


def _summarize(outcomes: pd.DataFrame, arm: str, metric: str) -> dict[str, Any]:
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


def _verdict_dict(verdict: Verdict) -> dict[str, Any]:
    fields = dict(vars(verdict))
    fields["metric"] = verdict.metric.name
    fields["share_improved"] = verdict.share_improved
    fields["interval"] = list(verdict.interval) if verdict.interval else None
    fields["failed"] = {verdict.arm: verdict.failed[0], verdict.baseline: verdict.failed[1]}
    return fields
