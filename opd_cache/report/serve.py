"""The local server of the page: a few fixed files and JSON answers, below a random path that only its user knows.

A request is answered only with that path, with a Host that cannot be another site's name, and without another site's
Origin. It reaches what the views of the runs hold and nothing else; it changes nothing.
"""

import hmac
import ipaddress
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from opd_cache.errors import ConfigError, OpdCacheError
from opd_cache.report.answers import to_json
from opd_cache.report.page import Page, served_page, static_files
from opd_cache.report.pages import Runs

IDLE_TIMEOUT_S = 60
LONGEST_BODY = 1_000_000
LENGTH = re.compile(r"[0-9]{1,18}")
QUERIES_AT_ONCE = 2
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
ASK_FOR_ADDRESS = "This page needs the whole address that `opd-cache serve` printed, with the random part at its end."


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class PageServer(ThreadingHTTPServer):
    """Listens at once; `serve_forever` answers. Raises ConfigError where it cannot listen."""

    daemon_threads = True

    def __init__(self, runs: Runs, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.runs, self.host, self.token = runs, host, secrets.token_urlsafe(24)
        self.page: Page = served_page(", ".join(runs.by_name))
        self.files = static_files()
        self.queries = threading.BoundedSemaphore(QUERIES_AT_ONCE)
        self.answers: dict[str, Callable[[dict[str, str]], Any]] = {
            "about": lambda _: runs.about(), "keys": lambda _: runs.keys(), "overview": lambda _: runs.overview(),
            "health": lambda _: runs.health(), "choices": runs.choices, "samples": runs.samples,
            "response": runs.response,
        }  # fmt: skip
        try:
            super().__init__((host, port), PageHandler)
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port}: {error.strerror or error}. Give another port, or --port 0 for any that is free."
            ) from error

    @property
    def url(self) -> str:
        """Where a browser on this machine, or one that can reach it, finds the page."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.server_address[1]}/{self.token}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine's own users can reach it."""
        return self.host == "localhost" or _is_address(self.host, loopback=True)

    def knows_host(self, host: str) -> bool:
        """Whether this Host header names this server, and not a site whose name was made to lead here."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:  # such as an address with one bracket
            return False
        own = {"localhost", self.host.lower()}
        if not self.is_local:
            own |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in own or _is_address(name, loopback=self.is_local)


def _is_address(name: str, loopback: bool) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback if loopback else True


class PageHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "opd-cache", ""
    timeout = IDLE_TIMEOUT_S
    # Head and body leave together: apart, the second waits 40 ms for the first to be acknowledged.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, give: Callable[[str], tuple[str, bytes]]) -> None:
        try:
            place = self._checked_place()
            kind, body = give(place)
        except Refused as refused:
            self.close_connection = True  # its body, if it has one, was not read
            self._send(refused.status, *_error(refused.reason))
        except OpdCacheError as error:
            self._send(HTTPStatus.BAD_REQUEST, *_error(" ".join(str(error).split())))
        else:
            self._send(HTTPStatus.OK, kind, body)

    def _checked_place(self) -> str:
        """What is asked for below the token. Raises Refused."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.knows_host(host):
            raise Refused(HTTPStatus.FORBIDDEN, f"Host {host[:80]!r} is not this server's name.")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"a page of {origin[:80]!r} may not ask this server.")
        try:
            path = urlsplit(self.path).path
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "the path is no path of a URL.") from error
        token, _, place = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, ASK_FOR_ADDRESS)
        return place

    def _get(self, place: str) -> tuple[str, bytes]:
        folder, _, name = place.partition("/")
        if not place:
            return "text/html; charset=utf-8", self.server.page.html.encode()
        if folder == "static" and name in self.server.files:
            return self.server.files[name]
        if folder == "api" and name in self.server.answers:
            return _json(self.server.answers[name](dict(parse_qsl(urlsplit(self.path).query))))
        raise Refused(HTTPStatus.NOT_FOUND, f"{place[:80]!r}: no such page.")

    def _post(self, place: str) -> tuple[str, bytes]:
        if place != "api/query":
            raise Refused(HTTPStatus.NOT_FOUND, f"{place[:80]!r}: no such page.")
        asked = self._body()
        if not self.server.queries.acquire(blocking=False):
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{QUERIES_AT_ONCE} queries are running; wait for one of them."
            )
        try:
            return _json(self.server.runs.query(asked["run"], asked["sql"]))
        finally:
            self.server.queries.release()

    def _body(self) -> dict[str, str]:
        """{"run": ..., "sql": ...}. Raises Refused."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not LENGTH.fullmatch(length):
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected JSON with a Content-Length.")
        if int(length) > LONGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the query is {length} bytes; at most {LONGEST_BODY}.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is no JSON.") from error
        if not isinstance(asked, dict) or not all(isinstance(asked.get(key), str) for key in ("run", "sql")):
            raise Refused(HTTPStatus.BAD_REQUEST, 'expected {"run": "NAME", "sql": "SELECT ..."}.')
        return asked

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, in the form and with the headers of all answers."""
        self.close_connection = True
        status = HTTPStatus(code)
        self._send(status, *_error(f"{status.phrase}."))

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        named = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.page.policy,
        }
        for name, value in {**named, **HEADERS}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: their paths hold the token."""


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", to_json(value).encode()


def _error(reason: str) -> tuple[str, bytes]:
    return _json({"error": reason})
