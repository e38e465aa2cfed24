"""One file over HTTP, gone on with where an earlier attempt ended."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from normlab.data.layouts import AbsentError
from normlab.data.progress import Progress

__all__ = ["download"]

_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 30.0
_CHUNK = 2**13  # Bytes; of a chunk that breaks off nothing is kept.
_WHOLE, _PART, _NOTHING_MORE = 200, 206, 416  # The server's answers to a request for a range.


class _NothingMoreError(Exception):
    """The server has nothing after what is here: it is the whole file, or another one."""


def download(url: str, path: Path, progress: Progress) -> None:
    """Download a file; what has come lies in `PATH.part` until it is complete.

    A connection that breaks is opened again, for what is missing, as long as each brings some of
    it. Nothing says yet that the bytes are the right ones: whoever reads the file checks that.

    Args:
        url: Of the file; redirects are followed.
        path: To write to; its folder must exist.
        progress: Shows a bar.

    Raises:
        AbsentError: The server cannot be reached, refuses, is silent, or keeps breaking off.
        OSError: The file cannot be written.
    """
    import requests

    part = path.with_name(f"{path.name}.part")
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(url, part, progress)
        except _NothingMoreError:
            break  # A fetch can be killed before it gives the file its name.
        except requests.ConnectTimeout:
            raise AbsentError(f"no connection within {_CONNECT_SECONDS:g} s") from None
        except requests.RequestException as error:
            if part.stat().st_size <= before:
                raise AbsentError(_cause(error)) from None
        else:
            break
    part.replace(path)


def _append(url: str, part: Path, progress: Progress) -> None:
    """Ask for what a partial file lacks, and add it."""
    import pooch
    import requests

    bar = progress.bar()
    with part.open("ab") as file, bar or nullcontext():
        have = file.tell()

        def prepare(response: requests.Response, *_: Any, **__: Any) -> None:
            """Look at an answer before any of its bytes are written."""
            status, extent = response.status_code, response.headers.get("Content-Range", "")
            if status == _WHOLE:
                file.truncate(0)  # The server knows no ranges, and begins anew.
            elif status == _PART and bar:
                bar.had = have
            if status < 400 and (status != _PART or extent.startswith(f"bytes {have}-")):
                return
            response.close()
            if status == _NOTHING_MORE and have:
                raise _NothingMoreError
            raise AbsentError(f"the server answers {status} {extent}".strip())

        pooch.HTTPDownloader(
            progressbar=bar or False,
            chunk_size=_CHUNK,
            timeout=(_CONNECT_SECONDS, _SILENT_SECONDS),
            # The bytes as they lie on the server: a range of them would else mean something else.
            headers={
                "Accept-Encoding": "identity",
                **({"Range": f"bytes={have}-"} if have else {}),
            },
            hooks={"response": prepare},
        )(url, file, None)


def _cause(error: BaseException) -> str:
    """Return what is at the bottom of an error that libraries have wrapped several times.

    `__context__` would also lead to what the caller was just handling.
    """
    while True:
        wrapped = (error.__cause__, getattr(error, "reason", None), *error.args)
        beneath = next((each for each in wrapped if isinstance(each, BaseException)), None)
        if beneath is None:
            return getattr(error, "strerror", None) or str(error) or type(error).__name__
        error = beneath
