"""The tables of a study's ledger."""

from __future__ import annotations

__all__ = ["ADDED", "APPLICATION_ID", "OLDEST", "SCHEMA", "VERSION"]

APPLICATION_ID = 0x6E726D6C  # "nrml", in the header of the file
VERSION = 5  # Also there.
ADDED = {
    4: """
CREATE TABLE histogram (
    arm TEXT, lr REAL, seed INTEGER, weight_decay REAL, step INTEGER, epoch INTEGER NOT NULL,
    layer TEXT, name TEXT, low REAL NOT NULL, high REAL NOT NULL, counts TEXT NOT NULL,
    PRIMARY KEY (arm, lr, seed, weight_decay, step, layer, name)
) WITHOUT ROWID
""",
    5: """
CREATE TABLE probe (
    arm TEXT, lr REAL, seed INTEGER, weight_decay REAL, step INTEGER, epoch INTEGER NOT NULL,
    probe TEXT, layer TEXT, name TEXT, value REAL NOT NULL,
    PRIMARY KEY (arm, lr, seed, weight_decay, step, probe, layer, name)
) WITHOUT ROWID
""",
}
"""Tables that earlier versions lack, by the version that has them."""
OLDEST = min(ADDED) - 1
"""The earliest version that lacks nothing else."""
SCHEMA = f"""
CREATE TABLE study (declaration TEXT NOT NULL);
CREATE TABLE own (field TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE session (
    id INTEGER PRIMARY KEY, started TEXT NOT NULL, seconds REAL NOT NULL, workers INTEGER NOT NULL,
    versions TEXT NOT NULL, machine TEXT NOT NULL
);
CREATE TABLE engine (
    arm TEXT PRIMARY KEY, kind TEXT NOT NULL, code TEXT NOT NULL, seconds TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE replica (
    arm TEXT, lr REAL, seed INTEGER, weight_decay REAL, status TEXT NOT NULL, step INTEGER NOT NULL,
    seconds REAL NOT NULL, PRIMARY KEY (arm, lr, seed, weight_decay)
) WITHOUT ROWID;
CREATE TABLE measurement (
    arm TEXT, lr REAL, seed INTEGER, weight_decay REAL, step INTEGER, epoch INTEGER NOT NULL,
    split TEXT, metric TEXT, value REAL NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (arm, lr, seed, weight_decay, step, split, metric)
) WITHOUT ROWID;
{ADDED[4]};
{ADDED[5]};
CREATE TABLE layer (
    arm TEXT, place INTEGER, name TEXT NOT NULL, kind TEXT NOT NULL, shape TEXT NOT NULL,
    parameters INTEGER NOT NULL, PRIMARY KEY (arm, place)
) WITHOUT ROWID;
CREATE TABLE learned (
    arm TEXT, lr REAL, seed INTEGER, weight_decay REAL, layer TEXT, name TEXT, value TEXT NOT NULL,
    PRIMARY KEY (arm, lr, seed, weight_decay, layer, name)
) WITHOUT ROWID;
"""
