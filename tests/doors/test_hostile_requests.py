"""Requests that no browser sends to `opd-cache serve`: each is answered in form, or its connection is closed, and it goes on."""

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from doors import bounded, contents, examples
from fault_log import FaultLog, SilentError
from hypothesis import example, given
from hypothesis import strategies as st

from opd_cache.limits import Limits
from opd_cache.report.pages import Runs
from opd_cache.report.serve import PageServer

ROW = "hostile requests"
POLICY = "Content-Security-Policy"


@pytest.fixture(scope="module")
def server(shared_run: Path) -> Iterator[PageServer]:
    server = PageServer(Runs({"tiny": shared_run}, False, Limits("500MB", 5)), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def answers(server: PageServer, request: bytes) -> bytes:
    """Everything that comes back on one connection."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        with contextlib.suppress(OSError):  # it need not read all of it
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                found += piece
    return found


def head(server: PageServer, place: str = "", method: str = "GET", host: str | None = None) -> str:
    return f"{method} {urlsplit(server.url).path}{place} HTTP/1.1\r\nHost: {host or urlsplit(server.url).netloc}\r\n"


def assert_in_form(server: PageServer, request: bytes) -> bytes:
    """One or more answers, each with the policy; no traceback, and the next request is answered."""
    said = io.StringIO()
    with bounded(), contextlib.redirect_stderr(said):
        found = answers(server, request)
    assert said.getvalue() == ""
    if found:
        assert found.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ", b"{")), found[:200]
        assert found.count(POLICY.encode()) == found.count(b"HTTP/1.") or found.startswith(b"{"), found[:500]
    if server.token.encode() in found and f"/{server.token}/".encode() not in request:
        raise SilentError("the token is given to who does not know it")
    alive = answers(server, (head(server, "api/about") + "Connection: close\r\n\r\n").encode())
    assert alive.startswith(b"HTTP/1.1 200"), alive[:100]
    return found


LENGTHS = ["-1", "1e3", "9" * 30, "9" * 5000, "0x10", "\u0661", "", " 2", "2, 3", "+2", "2.0"]
PLACES = [
    "../run.json", "%2e%2e/run.json", "static/../../run.json", "static/%00", "static//etc/passwd", "static/..%2f..%2fpage.html", "//etc/passwd",
    "api/samples?run=tiny&page=" + "9" * 5000, "api/samples?run=%ff%fe", "api/samples?run=tiny&kl_min=nan&text=%00", "api/response?run=tiny&episode=-1",
    "api/samples?run=tiny&text=" + quote("' OR 1=1 --"), "api/samples?run=tiny&sort=episode;DROP", "api/response?run=tiny&episode=0&rollout=" + "x" * 9000,
    "api/samples?run=tiny&teacher=%ed%a0%80", "api/samples?" + "a=1&" * 5000, "api/choices?run=tiny&run=tiny", "api/__class__", "?" * 3000, "#", "a" * 60_000,
    "api/samples?run=tiny&kl_max=" + "9" * 400, "api/samples?run=tiny&prompt=" + "9" * 9, "api/samples?run=tiny&kl_min=1e999", "api/samples?run=tiny&text=" + "%f0%9f%98%80" * 500,
]  # fmt: skip
HOSTS = ["[::1", "[", "]", "[x]", "evil.example", "127.0.0.1.evil.example", "localhost@evil", "a" * 10_000, "\x00", "[::ffff:1.2.3.4]", "0", "2130706433", "127.1"]  # fmt: skip


def test_hostile_places_hosts_and_lengths_are_answered_in_form(faults: FaultLog, server: PageServer) -> None:
    for place in PLACES:
        with faults.trial(ROW, f"path {place[:40]}"):
            found = assert_in_form(server, (head(server, place) + "Connection: close\r\n\r\n").encode())
            assert b'"run_id"' not in found or place.startswith(("?", "#")) is False
            assert b"root:" not in found
    for host in HOSTS:
        with faults.trial(ROW, f"Host {host[:40]!r}"):
            found = assert_in_form(
                server, (head(server, "api/overview", host=host) + "Connection: close\r\n\r\n").encode()
            )
            assert b" 200 " not in found.split(b"\r\n")[0]
    for length in LENGTHS:
        with faults.trial(ROW, f"Content-Length {length[:40]!r}"):
            post = (
                head(server, "api/query", "POST")
                + f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{{}}"
            )
            assert b" 200 " not in assert_in_form(server, post.encode()).split(b"\r\n")[0]


BODIES = [
    b"[" * 900_000, b'{"run": "tiny", "sql": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"run": "tiny", "sql": "\\ud800"}', b'{"run": "\\u0000", "sql": "x"}',
    b'{"run": "tiny", "sql": "SELECT 1\\u0000"}', b"\xff\xfe{\x00}\x00", b"9" * 5000, b"NaN", b"", b'{"run": "tiny", "sql": 3}', b'{"run": ["tiny"], "sql": "x"}',
    b'{"run": "", "sql": "SELECT 1"}', b'{"run": "../x", "sql": "SELECT 1"}', b'{"run": "tiny", "run": "x", "sql": "SELECT 1"}',
    json.dumps({"run": "tiny", "sql": "SELECT '" + "x" * 900_000 + "'"}).encode(), b'{"run": "tiny", "sql": "SELECT * FROM read_text(\'/etc/passwd\')"}',
    b'{"run": "tiny", "sql": "COPY (SELECT 1) TO \'/tmp/opd-cache-doors-served.csv\'"}',
]  # fmt: skip


def test_hostile_bodies_are_answered_in_form(faults: FaultLog, server: PageServer, shared_run: Path) -> None:
    before = contents(shared_run)
    for body in BODIES:
        request = (
            head(server, "api/query", "POST") + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        with faults.trial(ROW, f"body {body[:40]!r}"):
            found = assert_in_form(server, request.encode() + b"Connection: close\r\n\r\n" + body)
            assert b"root:" not in found
    assert contents(shared_run) == before
    assert not Path("/tmp/opd-cache-doors-served.csv").exists()


RAW = [
    b"", b"\r\n\r\n", b"GET", b"GET /", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"GET //[x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"X" * 70_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"CONNECT evil:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: folded\r\n\r\n", b"GET \x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    b"G\xc3\x89T / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff" * 100 + b"\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("request_bytes", RAW, ids=lambda data: ascii(data[:40]))
def test_what_is_no_request_is_answered_in_form(faults: FaultLog, server: PageServer, request_bytes: bytes) -> None:
    with faults.trial(ROW, f"{request_bytes[:40]!r}"):
        found = assert_in_form(server, request_bytes)
        assert not found.startswith(b"HTTP/1.1 200")


@examples(80, 5000)
@given(
    start=st.binary(max_size=30) | st.sampled_from([b"GET /", b"POST /", b"HEAD /"]),
    has_token=st.booleans(),
    rest=st.binary(max_size=60) | st.text(max_size=30).map(str.encode),
    headers=st.lists(st.tuples(st.sampled_from([b"Host", b"Origin", b"Content-Length", b"Content-Type", b"Transfer-Encoding", b"Expect", b"Connection", b"X"]), st.binary(max_size=20) | st.sampled_from([b"localhost", b"chunked", b"100-continue", b"keep-alive", b"application/json", b"5"])), max_size=5),
    body=st.binary(max_size=40),
)  # fmt: skip
@example(start=b"GET /", has_token=True, rest=b"", headers=[(b"Host", b"[")], body=b"")
def test_any_bytes_are_answered_in_form(
    faults: FaultLog, server: PageServer, start: bytes, has_token: bool, rest: bytes, headers: list, body: bytes
) -> None:
    token = f"{server.token}/".encode() if has_token else b""
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    with faults.trial(ROW, "any bytes"):
        assert_in_form(server, start + token + rest + b" HTTP/1.1\r\n" + lines + b"\r\n" + body)


def test_only_this_machine_can_connect_unless_it_was_asked_for(server: PageServer) -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError), socket.create_connection((address, server.server_address[1]), timeout=2):
            pass
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32


def test_a_page_of_another_site_is_refused_whatever_it_sends(faults: FaultLog, server: PageServer) -> None:
    own = urlsplit(server.url).netloc
    body = json.dumps({"run": "tiny", "sql": "SELECT 1"})
    for origin in (
        "http://evil.example",
        "null",
        f"https://{own}",
        f"http://{own}.evil.example",
        f"http://{own}@evil",
        "",
    ):
        with faults.trial(ROW, f"Origin {origin}"):
            connection = http.client.HTTPConnection(own, timeout=20)
            place = f"{urlsplit(server.url).path}api/query"
            connection.request("POST", place, body, {"Content-Type": "application/json", "Origin": origin})
            assert connection.getresponse().status == 403
            connection.close()
