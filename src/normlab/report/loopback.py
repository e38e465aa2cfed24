"""A server for the person at this machine: a few pages, and an address that nobody can guess."""

from __future__ import annotations

import secrets
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from normlab.errors import InputError

__all__ = ["Loopback"]

_HOST = "127.0.0.1"
_PATIENCE = 10.0  # Seconds for a client to send its request, and as many to take the answer.
_HEADERS = {
    "Cache-Control": "no-store",
    # The page is whole by itself.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Loopback(socketserver.ThreadingTCPServer):
    """Serves pages on 127.0.0.1, each request in a thread of its own.

    Whoever does not have the token gets an empty 404, and so does a page of another site that has
    made its own name stand for 127.0.0.1: the Host that it sends is not ours. Nothing is read from
    a file by its name, and nothing can be sent.

    Args:
        pages: What makes each page, by its path below the token. It returns the page's media type
            and its content, and is called in the thread of the request.
        port: To listen at; a free one for 0.

    Raises:
        InputError: The port cannot be listened at.

    >>> from urllib.request import urlopen
    >>> with Loopback({"": lambda: ("text/plain", b"hello")}) as server:
    ...     urlopen(server.address).read()
    b'hello'
    """

    allow_reuse_address = True  # Else a port could not be had again for a minute.
    daemon_threads = True
    request_queue_size = 64  # With a few, a browser's connections would wait for a second.

    def __init__(self, pages: Mapping[str, Callable[[], tuple[str, bytes]]], port: int = 0) -> None:
        if not 0 <= port < 2**16:
            raise InputError(f"port {port}: expected a number from 1 to 65535, or 0 for a free one")
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"port {port} of {_HOST} cannot be listened at ({error.strerror}): name another, "
                "or none to have a free one"
            ) from None
        port = self.server_address[1]
        self.hosts = (f"{_HOST}:{port}", f"localhost:{port}")
        root = f"/{secrets.token_urlsafe(16)}/"
        self.pages = {(root + path).encode(): make for path, make in pages.items()}
        self.address = f"http://{_HOST}:{port}{root}"

    def __enter__(self) -> Loopback:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away, or was too slow."""


class _Handler(BaseHTTPRequestHandler):
    server: Loopback
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self.wfile.write(self._begin())

    def do_HEAD(self) -> None:
        self._begin()

    def _begin(self) -> bytes:
        """Send all but the content, and return that."""
        make = self._wanted()
        if make is None:
            return self._answer(404)
        try:
            kind, content = make()
        except Exception as error:  # Whatever is wrong with a page, its server goes on.
            return self._answer(500, "text/plain; charset=utf-8", str(error).encode())
        return self._answer(200, kind, content)

    def _wanted(self) -> Callable[[], tuple[str, bytes]] | None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            return None
        path = self.path.encode("latin-1")  # As it was decoded.
        found = [
            make for known, make in self.server.pages.items() if secrets.compare_digest(path, known)
        ]
        return found[0] if found else None

    def _answer(self, code: int, kind: str = "", content: bytes = b"") -> bytes:
        self.send_response_only(code)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        return content

    def send_error(self, *_: Any, **__: Any) -> None:
        """Refuse other methods, and what is no request, as what is not there."""
        self._answer(404)

    def log_message(self, *_: Any) -> None:
        """Keep no log of requests."""
