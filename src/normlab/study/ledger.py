"""The ledger: a SQLite file that keeps a study's measurements as they are made."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from normlab.errors import InputError, LedgerError
from normlab.files import held
from normlab.study.declaration import FOR_PEOPLE, Study
from normlab.study.schema import ADDED, APPLICATION_ID, OLDEST, SCHEMA, VERSION
from normlab.training import Choice, Engine, Event, Measurement, Reading, Replica
from normlab.training.networks import Layer

__all__ = ["FILENAME", "Ledger"]

FILENAME = "ledger.sqlite"
_LOG = f"{FILENAME}-wal"  # Where SQLite puts what is written before it goes into the file.
_LOCK = "ledger.lock"
_REPLICA = ", ".join(Replica._fields)


class Ledger:
    """One study's measurements, in one file, with one writer.

    Every evaluation is a transaction, so a kill at any moment loses at most the one being written.
    A replica without an outcome counts as not run: its measurements are dropped when the study
    goes on, and made again.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    @classmethod
    @contextmanager
    def write(
        cls, folder: Path, study: Study, own: Mapping[str, str] | None = None
    ) -> Iterator[Ledger]:
        """Open a folder's ledger to add to it, making both if they are not there.

        Args:
            folder: The run's.
            study: What it must hold.
            own: Digests of what the study's fields name of the user's own, `dataset` or `network`,
                which must be what they were.

        Raises:
            InputError: The folder cannot be written, holds another study or one of something
                else, or is in use.
            LedgerError: The file there is damaged or is no ledger.
        """
        with held(folder, _LOCK), cls._open(folder / FILENAME, "rwc") as ledger:
            ledger._prepare(study, own or {})
            yield ledger
            # SQLite does so as the last one closes the file, and a reader may be later. The file
            # alone is the ledger then, whatever else is left beside it.
            ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @classmethod
    @contextmanager
    def read(cls, folder: Path) -> Iterator[Ledger]:
        """Open a folder's ledger to read it, also while a run adds to it.

        Nothing in the folder is changed, and nothing added to it.

        Raises:
            InputError: There is none.
            LedgerError: It is damaged or is no ledger, or a run began to write as it was read.
        """
        path = folder / FILENAME
        if not path.is_file():
            raise InputError(f"{folder} holds no run: there is no {FILENAME} in it")
        # A file without a log is at rest. SQLite would make a log and an index to read it, and
        # leave both, unless it is told so.
        rests, stamp = not _size_of(folder / _LOG), cls.stamp(folder)
        with cls._open(path, "ro&immutable=1" if rests else "ro") as ledger:
            ledger._check()
            yield ledger
        if rests and cls.stamp(folder) != stamp:
            raise LedgerError(f"{path} was written to while it was read: read it again")

    @staticmethod
    def stamp(folder: Path) -> str:
        """Return a text that changes with a folder's ledger.

        The ledger is not opened for it: whoever has it open as a run ends keeps SQLite from
        clearing away its log.
        """
        stamps = []
        for name in (FILENAME, _LOG):
            try:
                found = (folder / name).stat()
            except FileNotFoundError:
                continue
            stamps.append(f"{found.st_size:x}.{found.st_mtime_ns:x}")
        return "-".join(stamps)

    @staticmethod
    def in_use(folder: Path) -> bool:
        """Return whether a run holds a folder's ledger, to write to it."""
        import fcntl

        try:
            file = os.open(folder / _LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)  # And with it the lock goes.
        return False

    @classmethod
    @contextmanager
    def _open(cls, path: Path, mode: str) -> Iterator[Ledger]:
        connection = None
        try:
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None)
            yield cls(connection, path)
        except sqlite3.OperationalError as error:
            if "readonly" in str(error) or "unable to open" in str(error):
                raise InputError(f"{path} cannot be used: {error}") from None
            raise LedgerError(
                f"{path}: {error}; what was measured before is kept: make room, and run the same "
                "command again"
            ) from None
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} is damaged ({error}): move it away to start anew") from None
        finally:
            if connection is not None:
                connection.close()

    def _check(self) -> None:
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        if application_id != APPLICATION_ID:
            raise LedgerError(f"{self.path} is not a ledger of normlab: move it away to start anew")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if not OLDEST <= version <= VERSION:
            raise LedgerError(
                f"{self.path} is of another version of normlab: use that one, or move it away to "
                "start anew"
            )
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            found = " ".join(verdict.split())
            raise LedgerError(f"{self.path} is damaged ({found}): move it away to start anew")

    def _lacking(self) -> list[str]:
        """Return the statements that make the tables which this file is too old to have."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        return [statement for since, statement in ADDED.items() if since > version]

    def _prepare(self, study: Study, own: Mapping[str, str]) -> None:
        is_new = not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_new:
            self._check()
        self._connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL loses nothing to a kill of the process; only a power cut can take the
        # last transactions, and never the file.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        if is_new:
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute("INSERT INTO study VALUES (?)", (study.to_toml(),))
                self._connection.executemany("INSERT INTO own VALUES (?, ?)", own.items())
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
        elif lacking := self._lacking():
            with self._transaction():
                for statement in lacking:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
        held = self.study
        if held.fingerprint != study.fingerprint:
            raise InputError(
                f"{self.path.parent} holds another study ({_difference(held, study)}): "
                "name another folder with --out"
            )
        for field, before in self._connection.execute("SELECT field, digest FROM own"):
            if before != own[field]:
                raise InputError(
                    f"{self.path.parent} was begun with another {field}: the SHA-256 of "
                    f"{getattr(study, field)} was {before[:12]}…, and is {own[field][:12]}…: name "
                    "another folder with --out"
                )
        with self._transaction():
            for table in ("measurement", "histogram", "probe"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE ({_REPLICA}) NOT IN "
                    f"(SELECT {_REPLICA} FROM replica)"
                )

    def begin_session(self, workers: int, device: str = "cpu") -> None:
        """Note that measuring starts: when, with which versions, on what machine.

        Args:
            workers: Processes that train.
            device: What they train on.

        Raises:
            InputError: The study was begun with other versions, or on another kind of machine.
        """
        versions, machine = _versions(), {**_machine(), "device": device}
        for session in self.rows("session")[-1:]:
            # Before there were devices it was the processor.
            before = {
                "device": "cpu",
                **json.loads(session["versions"]),
                **json.loads(session["machine"]),
            }
            for name in ("normlab", "torch", "system", "processor", "device"):
                now = {**versions, **machine}[name]
                if before[name] != now:
                    raise InputError(
                        f"{self.path.parent} was begun with {name} {before[name]}, and this is "
                        f"{now}, whose numbers may differ: name another folder with --out"
                    )
        started = datetime.now(timezone.utc)
        with self._transaction():
            cursor = self._connection.execute(
                "INSERT INTO session (started, seconds, workers, versions, machine) "
                "VALUES (?, 0, ?, ?, ?)",
                (
                    started.isoformat(timespec="seconds"),
                    workers,
                    json.dumps(versions),
                    json.dumps(machine),
                ),
            )
        self._session, self._started = cursor.lastrowid, started.timestamp()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def add(self, event: Event, seconds: float) -> None:
        """Keep an event.

        Args:
            event: A measurement, what probes read, a replica's outcome, or the choice of an arm's
                engine.
            seconds: How long the session has taken so far.
        """
        with self._transaction():
            if isinstance(event, Measurement):
                # By the session's own clock, which never goes back, whatever the machine's does.
                time = self._started + seconds
                self._connection.executemany(
                    "INSERT INTO measurement VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (*event.replica, event.step, event.epoch, split, metric, value, time)
                        for (split, metric), value in event.values.items()
                    ],
                )
                self._connection.executemany(
                    "INSERT INTO histogram VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (*event[0], *event[1:3], layer, name, low, high, json.dumps(counts))
                        for layer, seen in event.histograms.items()
                        for name, (low, high, counts) in seen.items()
                    ],
                )
            elif isinstance(event, Reading):
                self._connection.executemany(
                    "INSERT INTO probe VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (*event.replica, event.step, event.epoch, probe, layer, name, value)
                        for probe, layers in event.values.items()
                        for layer, seen in layers.items()
                        for name, value in seen.items()
                    ],
                )
            elif isinstance(event, Choice):
                self._connection.execute(
                    "INSERT INTO engine VALUES (?, ?, ?, ?)",
                    (event.arm, *event.engine, json.dumps(event.seconds)),
                )
            else:
                self._connection.execute(
                    "INSERT INTO replica VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*event.replica, event.status, event.step, event.seconds),
                )
                self._connection.executemany(
                    "INSERT INTO learned VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        (*event.replica, layer, name, json.dumps(value))
                        for layer, values in event.learned.items()
                        for name, value in values.items()
                    ],
                )
            self._connection.execute(
                "UPDATE session SET seconds = ? WHERE id = ?", (seconds, self._session)
            )

    def describe(self, arm: str, layers: Sequence[Layer]) -> None:
        """Keep what an arm's network is made of."""
        with self._transaction():
            self._connection.executemany(
                "INSERT OR REPLACE INTO layer VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (arm, place, each.name, each.kind, json.dumps(each.shape), each.parameters)
                    for place, each in enumerate(layers)
                ],
            )

    @property
    def study(self) -> Study:
        """The study that the ledger holds."""
        (text,) = self._connection.execute("SELECT declaration FROM study").fetchone()
        return Study.from_toml(text, str(self.path))

    def finished(self) -> set[Replica]:
        """Return the replicas that have an outcome."""
        rows = self._connection.execute(f"SELECT {_REPLICA} FROM replica")
        return {Replica(*row) for row in rows}

    def choices(self) -> dict[str, Choice]:
        """Return the engines that were chosen, by arm."""
        rows = self._connection.execute("SELECT arm, kind, code, seconds FROM engine")
        return {
            arm: Choice(arm, Engine(kind, code), json.loads(seconds))
            for arm, kind, code, seconds in rows
        }

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return a table's rows in the order of its key.

        Args:
            table: `measurement`, `histogram`, `probe`, `replica`, `engine`, `session`, `layer` or
                `learned`.
        """
        if any(f"CREATE TABLE {table} " in statement for statement in self._lacking()):
            return []
        order = {
            "measurement": f"{_REPLICA}, step, split, metric",
            "histogram": f"{_REPLICA}, step, layer, name",
            "probe": f"{_REPLICA}, step, probe, layer, name",
            "replica": _REPLICA,
            "engine": "arm",
            "session": "id",
            "layer": "arm, place",
            "learned": f"{_REPLICA}, layer, name",
        }[table]
        cursor = self._connection.execute(f"SELECT * FROM {table} ORDER BY {order}")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def _difference(held: Study, wanted: Study) -> str:
    """Return the first field in which two studies of different fingerprints differ."""
    before, now = (study.model_dump(exclude=set(FOR_PEOPLE)) for study in (held, wanted))
    field = next(field for field in before if before[field] != now[field])
    return f"its {field} is {before[field]}, not {now[field]}"


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _versions() -> dict[str, str]:
    packages = ("normlab", "torch", "numpy")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
