"""Keeps what was measured of claims, a seed at a time."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from normlab.claims.claim import Claim, Row
from normlab.errors import InputError, LedgerError
from normlab.files import held

__all__ = ["Kept", "Ledger"]

_FILENAME = "claims.sqlite"
_APPLICATION_ID = 0x6E6C636C  # "nlcl", in the header of the file
_SCHEMA = """
CREATE TABLE IF NOT EXISTS seed (
    claim TEXT, quick INTEGER, seed INTEGER, digest TEXT NOT NULL, numbers TEXT NOT NULL,
    seconds REAL NOT NULL, measured TEXT NOT NULL, PRIMARY KEY (claim, quick, seed)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Kept:
    """What was measured of a seed.

    Attributes:
        rows: The numbers.
        seconds: How long that took.
        measured: When it was done, ISO 8601, in UTC.
    """

    rows: list[Row]
    seconds: float
    measured: str


class Ledger:
    """The claims' measurements in one file; each seed is a transaction, and survives a kill."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def write(cls, folder: Path) -> Iterator[Ledger]:
        """Open a folder's ledger to add to it.

        Raises:
            InputError: The folder cannot be written, or is in use.
            LedgerError: The file there is damaged or something else.
        """
        with held(folder, "claims.lock"), cls._open(folder / _FILENAME, "rwc") as ledger:
            yield ledger

    @classmethod
    @contextmanager
    def read(cls, folder: Path) -> Iterator[Ledger | None]:
        """Open a folder's ledger to read it; None if there is none.

        Raises:
            InputError: The folder is a file.
            LedgerError: The ledger is damaged or something else.
        """
        if folder.is_file():
            raise InputError(f"{folder} is a file: name a folder with --out")
        if not (folder / _FILENAME).is_file():
            yield None
            return
        with cls._open(folder / _FILENAME, "ro") as ledger:
            # One that was killed before it had a table holds nothing.
            query = "SELECT count(*) FROM sqlite_master"
            (tables,) = ledger._connection.execute(query).fetchone()
            yield ledger if tables else None

    @classmethod
    @contextmanager
    def _open(cls, path: Path, mode: str) -> Iterator[Ledger]:
        try:
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
                (kind,) = connection.execute("PRAGMA application_id").fetchone()
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if kind != _APPLICATION_ID and tables:
                    raise LedgerError(f"{path} is no ledger of claims: move it away to start anew")
                if mode == "rwc":
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    connection.execute(_SCHEMA)
                yield cls(connection)
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"{path}: {error}; what was measured before is kept: mend that, and run the same "
                "command again"
            ) from None
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} is damaged ({error}): move it away to start anew") from None

    def kept(self, claim: Claim, quick: bool) -> dict[int, Kept]:
        """Return what was measured of a claim as it is declared now, by seed."""
        rows = self._connection.execute(
            "SELECT seed, numbers, seconds, measured FROM seed "
            "WHERE claim = ? AND quick = ? AND digest = ? ORDER BY seed",
            (claim.name, quick, _digest(claim)),
        )
        return {
            seed: Kept(_rows(numbers), seconds, measured)
            for seed, numbers, seconds, measured in rows
            if seed in claim.seeds
        }

    def keep(
        self, claim: Claim, quick: bool, seed: int, rows: Iterable[Row], seconds: float
    ) -> None:
        """Keep what was measured of a seed, in place of what was there."""
        # JSON has no word for what is not finite.
        numbers = [
            [arm, quantity, at, value if math.isfinite(value) else str(float(value))]
            for arm, quantity, at, value in rows
        ]
        measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._connection.execute(
            "INSERT OR REPLACE INTO seed VALUES (?, ?, ?, ?, ?, ?, ?)",
            (claim.name, quick, seed, _digest(claim), json.dumps(numbers), seconds, measured),
        )


def _rows(numbers: str) -> list[Row]:
    return [
        Row(arm, quantity, at, float(value)) for arm, quantity, at, value in json.loads(numbers)
    ]


def _digest(claim: Claim) -> str:
    """Return a digest of what the numbers depend on, as far as it is declared."""
    versions = [metadata.version(package) for package in ("normlab", "torch")]
    declared = [claim.setup, claim.metric, *map(repr, claim.parts), *versions]
    return hashlib.sha256("\n".join(declared).encode()).hexdigest()
