import http.client
import re
import socket
import struct
import time
from contextlib import ExitStack

import pytest

from normlab.errors import InputError
from normlab.report.loopback import Loopback, _Handler


def broken():
    raise ValueError("no page")


PAGES = {
    "": lambda: ("text/html", b"<p>whole"),
    "version": lambda: ("text/plain", b"1"),
    "broken": broken,
}
TOKEN = re.compile(r"http://127\.0\.0\.1:(\d+)(/[\w-]{20,}/)")


@pytest.fixture
def server():
    with Loopback(PAGES) as one:
        yield one


@pytest.fixture
def ask(server):
    """Sends a request, to the page unless it says otherwise, and returns the whole answer."""
    port, root = TOKEN.fullmatch(server.address).groups()

    def send(method="GET", path=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
        connection.putrequest(method, root if path is None else path, skip_host=True)
        for value in headers.pop("hosts", [f"127.0.0.1:{port}"]):
            connection.putheader("Host", value.format(port=port))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    send.root, send.port = root, int(port)
    return send


def test_who_has_the_address_gets_the_pages(ask):
    status, headers, content = ask()
    assert (status, content) == (200, b"<p>whole")
    assert headers["Content-Type"] == "text/html"
    assert headers["Content-Length"] == "8"
    assert ask(path=f"{ask.root}version")[2] == b"1"
    assert ask(hosts=["localhost:{port}"])[0] == 200


def test_nothing_is_kept_told_or_let_in(ask):
    _, headers, _ = ask()
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-eval" not in headers["Content-Security-Policy"]
    assert "Server" not in headers


def test_head_has_the_headers_alone(ask):
    status, headers, content = ask("HEAD")
    assert (status, content) == (200, b"")
    assert headers == ask()[1]
    request = f"HEAD {ask.root} HTTP/1.1\r\nHost: 127.0.0.1:{ask.port}\r\n\r\n"
    assert raw(ask.port, request.encode()).endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/version",
        "{root}nothing",
        "{root}?",
        "{bare}",
        "{root}../",
        "//",
        "{wrong}",
    ],
)
def test_another_path_gets_nothing(ask, path):
    wrong = ask.root[:-2] + ("A" if ask.root[-2] != "A" else "B") + "/"
    path = path.format(root=ask.root, bare=ask.root[:-1], wrong=wrong)
    refused(ask(path=path))


def test_files_are_not_served(ask):
    for path in ("/etc/hostname", f"{ask.root}/etc/hostname", f"{ask.root}../../etc/hostname"):
        refused(ask(path=path))


def refused(answer):
    status, headers, content = answer
    assert (status, content) == (404, b"")
    assert headers["Content-Length"] == "0"
    assert "Server" not in headers


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        ["example.org:{port}"],
        ["127.0.0.1"],
        ["127.0.0.1:1{port}"],
        ["localhost"],
        ["127.0.0.1:{port}.example.org"],
        ["127.0.0.1:{port}", "example.org"],
        ["0.0.0.0:{port}"],
    ],
)
def test_another_host_gets_nothing(ask, hosts):
    refused(ask(hosts=hosts))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_another_method_gets_nothing(ask, method):
    refused(ask(method))


def test_every_server_has_a_token_of_its_own(server):
    with Loopback(PAGES) as other:
        tokens = {TOKEN.fullmatch(one.address).group(2) for one in (server, other)}
    assert len(tokens) == 2


def test_it_listens_at_the_loopback_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def raw(port, text):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


@pytest.mark.parametrize(
    "text", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b""]
)
def test_what_is_no_request_is_told_nothing(ask, text, capfd):
    answer = raw(ask.port, text)
    assert answer.partition(b"\r\n\r\n")[2] == b""
    assert b"Error" not in answer
    assert ask()[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_path_of_other_letters_gets_nothing(ask):
    answer = raw(ask.port, f"GET /é HTTP/1.1\r\nHost: 127.0.0.1:{ask.port}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 404 ")
    assert answer.endswith(b"\r\n\r\n")


def test_a_page_that_fails_says_why_and_the_others_are_there(ask, capfd):
    status, headers, content = ask(path=f"{ask.root}broken")
    assert (status, content) == (500, b"no page")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert ask()[0] == 200
    assert capfd.readouterr() == ("", "")


def test_clients_that_send_nothing_are_in_nobodys_way_and_do_not_stay(ask, monkeypatch):
    assert 1 <= _Handler.timeout <= 30
    monkeypatch.setattr("normlab.report.loopback._Handler.timeout", 1.0)
    with ExitStack() as stack:
        connect = socket.create_connection
        idle = [
            stack.enter_context(connect(("127.0.0.1", ask.port), timeout=10)) for _ in range(12)
        ]
        idle[0].sendall(b"GET ")
        started = time.monotonic()
        assert ask()[0] == 200
        assert time.monotonic() - started < 0.9
        assert [client.recv(1) for client in idle] == [b""] * 12  # They were hung up on.


def test_a_client_that_does_not_take_its_answer_is_in_nobodys_way(monkeypatch, capfd):
    monkeypatch.setattr("normlab.report.loopback._Handler.timeout", 0.3)
    with Loopback({"": lambda: ("text/plain", b"x" * 50_000_000)}) as server:
        port, root = TOKEN.fullmatch(server.address).groups()
        with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
            client.sendall(f"GET {root} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            time.sleep(0.6)
            received = sum(len(part) for part in iter(lambda: client.recv(1_000_000), b""))
    assert received < 50_000_000
    assert capfd.readouterr() == ("", "")


def test_nothing_is_said_of_a_client_that_goes_away(capfd):
    with Loopback({"": lambda: ("text/plain", b"x" * 50_000_000)}) as server:
        port, root = TOKEN.fullmatch(server.address).groups()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
                # It does not say goodbye.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(f"GET {root} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                client.recv(1)
        time.sleep(0.3)
    assert capfd.readouterr() == ("", "")


def test_the_end_of_a_server_waits_for_no_client():
    with Loopback(PAGES) as server:
        client = socket.create_connection(server.server_address, timeout=10)
        started = time.monotonic()
    assert time.monotonic() - started < 1
    client.close()


def test_a_port_can_be_chosen_and_is_refused_while_it_is_in_use(server):
    port = server.server_address[1]
    message = f"port {port} of 127.0.0.1 cannot be listened at (Address already in use): "
    with pytest.raises(InputError, match=re.escape(message)):
        Loopback(PAGES, port)
    with Loopback(PAGES) as other:
        free = other.server_address[1]
        raw(free, b"GET / HTTP/1.1\r\n\r\n")
    with Loopback(PAGES, free) as again:
        assert again.address.startswith(f"http://127.0.0.1:{free}/")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(InputError, match=f"port {port}: expected a number from 1 to 65535, or 0"):
        Loopback(PAGES, port)
