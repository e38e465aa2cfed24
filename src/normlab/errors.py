"""Errors that normlab raises on purpose: one line that says what to do, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["FetchError", "InputError", "LedgerError", "NormlabError", "did_you_mean"]


class NormlabError(Exception):
    """Anything that normlab refuses or cannot do, with what was expected and what to do."""


class InputError(NormlabError, ValueError):
    """The user's input cannot be used: a study, an arm, a number, a folder."""


class FetchError(NormlabError):
    """A data set cannot be had from any source; the message has a line for each, and says why."""


class LedgerError(NormlabError):
    """A ledger cannot be read or written: damaged, of another program, or the disk is full."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the clause that suggests the nearest known word, or nothing if none is near.

    >>> did_you_mean("epoch", ["epochs", "seeds"])
    ' (did you mean epochs?)'
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
