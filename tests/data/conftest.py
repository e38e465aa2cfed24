import contextlib
import functools
import gzip
import hashlib
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from normlab.data.layouts import ARRAYS, IDX
from normlab.data.published import Array, Published
from normlab.data.sources import Mirror


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


class Behaviour(BaseHTTPRequestHandler):
    """Serves files; the first part of the path says how."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        start = self.headers.get("Range")
        self.server.asked.append((how, name, start))
        content = self.server.files.get(name)
        if content is None or how == "absent":
            self.send_error(404)
        elif how == "moved":
            self.send_response(302)
            self.send_header("Location", f"/ordinary/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif start and how != "rangeless":
            self.send_range(how, content, int(start.removeprefix("bytes=").removesuffix("-")))
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.send(how, content)

    def send_range(self, how, content, start):
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = 0 if how == "shifted" else start
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.send(how, content[first:])

    def send(self, how, content):
        if how == "corrupt":
            content = content[:-1000] + bytes(1000)
        if how in ("truncated", "rangeless") and len(content) > 50_000:
            content = content[: len(content) // 2]
            self.close_connection = True
        if how == "silent":
            self.wfile.write(content[:100])
            self.server.over.wait(5)
            self.close_connection = True
        elif how == "slow":
            for place in range(0, len(content), 10_000):
                self.wfile.write(content[place : place + 10_000])
                if self.server.over.wait(self.server.pause):
                    return
        else:
            self.wfile.write(content)

    def handle(self):
        # Clients that go away are what some tests are about.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """An HTTP server with the small set's files; `asked` holds what it was asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Behaviour) as server:
        server.files, server.asked = packed(), []
        server.over, server.pause = threading.Event(), 0.02
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@functools.lru_cache
def arrays():
    """A set of noise: 300 KB that do not shrink when they are packed."""
    random = np.random.default_rng(0)
    return {
        "train_images": random.integers(0, 256, (300, 28, 28), np.uint8),
        "train_labels": np.arange(300, dtype=np.uint8) % 3,
        "test_images": random.integers(0, 256, (60, 28, 28), np.uint8),
        "test_labels": np.arange(60, dtype=np.uint8) % 3,
    }


@functools.lru_cache
def packed():
    return {
        name: gzip.compress(idx(arrays()[key]), compresslevel=1)
        for key, name in zip(ARRAYS, IDX.files, strict=True)
    }


@pytest.fixture
def small():
    """A published set; called with sources, or with URLs of mirrors."""

    def make(*sources):
        return Published(
            name="small",
            arrays={
                key: Array(array.shape, hashlib.sha256(array.data).hexdigest())
                for key, array in arrays().items()
            },
            class_names=("a", "b", "c"),
            sources=tuple(Mirror(s, IDX) if isinstance(s, str) else s for s in sources),
            layouts=(IDX,),
        )

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder in which the small set is kept, empty."""
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    return tmp_path / "cache" / "data"


@pytest.fixture
def until():
    def wait(condition):
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it did not happen within ten seconds")

    return wait
