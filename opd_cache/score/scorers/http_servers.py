"""Asking the servers of one teacher: which is asked next, what is tried again and when, and what ends the stage.

What is asked and what an answer means is in http_shapes.py and http_served.py.
"""

import asyncio
import json
import logging
import os
import random
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TypeVar

import httpx

from opd_cache.config import HttpOptions
from opd_cache.errors import ConfigError, TryAgainError
from opd_cache.score.scorers.http_shapes import UnfitReplyError, decoded

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10.0
MAX_DELAY_S = 60.0
MAX_RETRY_AFTER_S = 600.0
FAILURES_BEFORE_REST = 3  # in a row: one lost request says nothing of the others
REASON_CHARS = 300
LONGEST_ANSWER = 1 << 30  # bytes; 100,000 tokens with a top k of 64 are 0.5 GB of vLLM's JSON


class FailedTryError(Exception):
    """One try failed in a way that the next may not."""

    def __init__(self, what: str, is_down: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.is_down, self.retry_after_s = is_down, retry_after_s


@dataclass(eq=False)
class Server:
    """One server and how it has been doing. It rests when nothing should be sent to it for a while."""

    url: str
    in_flight: int = 0
    sent: int = 0
    failures: int = 0  # since its last answer
    glitches: int = 0  # answers that were none
    rests_until: float = 0.0  # on the monotonic clock
    is_met: bool = False  # it has said that it serves the teacher


Answer = TypeVar("Answer")
Meet = Callable[[httpx.AsyncClient, Server], Awaitable[None]]


class Servers:
    """The servers of one teacher. `meet` asks one what it serves, and raises ConfigError when that is another model."""

    def __init__(self, urls: list[str], options: HttpOptions, meet: Meet) -> None:
        if not urls:
            raise ConfigError(
                "the teacher has no server. Set score.http.urls=[http://HOST:PORT], or teachers.NAME.urls."
            )
        self.options, self._meet = options, meet
        self.all = [Server(url.rstrip("/")) for url in urls]
        self._key: str | None = None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def client(self) -> httpx.AsyncClient:
        """A client for one request at a time: a pool of connections that many share costs more than the requests."""
        variable = self.options.api_key_env
        if variable is not None:
            self._key = _key_of(variable)
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        # The whole request has one deadline, in `send`; a host that swallows packets is found out sooner.
        timeout = httpx.Timeout(None, connect=min(CONNECT_TIMEOUT_S, self.options.timeout_s))
        return httpx.AsyncClient(headers=headers, timeout=timeout, verify=self._tls, follow_redirects=False)

    async def meet_all(self, client: httpx.AsyncClient, retries: int) -> None:
        """Ask every server what it serves. One that is not there is asked again when its turn comes.

        Raises TryAgainError when none answers, ConfigError when one cannot serve the teacher.
        """
        for server in self.all:
            server.is_met = False
        for attempt in range(retries + 1):
            if attempt:
                await asyncio.sleep(self._delay_s(attempt - 1))
            await self._next(Counter())  # not before the first of them may be asked again
            faults = {}
            for server in self.all:
                try:
                    await self._meet_once(client, server)
                except FailedTryError as error:
                    self._note_failure(server, error)
                    faults[server.url] = str(error)
            if len(faults) < len(self.all):
                return
        what = "; ".join(f"{url}: {fault}" for url, fault in faults.items())
        raise TryAgainError(
            f"{what}. No server of the teacher answers; nothing was published. Start it and run the same command again."
        )

    async def ask(
        self, client: httpx.AsyncClient, path: str, content: bytes, read: Callable[[bytes], Answer]
    ) -> Answer:
        """What `read` makes of the first answer; an answer that it raises UnfitReplyError for is asked for once more.

        Raises TryAgainError when max_retries is used up, ConfigError when a server refuses the request, UnfitReplyError
        when the second answer is as unfit.
        """
        tries: Counter[Server] = Counter()
        failures = glitches = 0
        while True:
            server = await self._next(tries)
            try:
                return self.read(await self._try(client, server, path, content), read)
            except UnfitReplyError as error:
                glitches += 1
                if glitches > 1:
                    raise UnfitReplyError(f"{server.url}: {error}") from error
                # One line a server: of one that is wrong altogether, the error at the end says how often.
                level = logging.DEBUG if server.glitches else logging.WARNING
                log.log(level, "score   %s is asked again | %s", server.url, error)
                server.glitches += 1
            except FailedTryError as error:
                failures += 1
                if failures > self.options.max_retries:
                    raise TryAgainError(
                        f"{server.url}{path}: {error}, the last of {failures} tries; the shard was not published. Run the same command again when the teacher's servers answer."
                    ) from error
                self._note_failure(server, error)
                await asyncio.sleep(self._delay_s(failures - 1))
            tries[server] += 1

    async def _try(self, client: httpx.AsyncClient, server: Server, path: str, content: bytes) -> bytes:
        server.in_flight += 1
        server.sent += 1
        try:
            await self._meet_once(client, server)
            answer = await self.send(client, server, "POST", path, content)
        finally:
            server.in_flight -= 1
        server.failures = 0
        return answer or b""

    async def send(
        self,
        client: httpx.AsyncClient,
        server: Server,
        method: str,
        path: str,
        content: bytes | None = None,
        absent: Container[int] = (),
    ) -> bytes | None:
        """One try. None where the status is among `absent`: the server has no such path."""
        try:
            async with (
                asyncio.timeout(self.options.timeout_s),
                client.stream(method, server.url + path, content=content) as response,
            ):
                answer = await _read_whole(response)
        except TimeoutError as error:
            raise FailedTryError(f"no answer in {self.options.timeout_s:g} s") from error
        except httpx.TransportError as error:
            is_down = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise FailedTryError(self.one_line(f"{type(error).__name__} {error}"), is_down) from error
        except httpx.DecodingError as error:
            raise UnfitReplyError(self.one_line(str(error))) from error
        status = response.status_code
        if status in absent:
            return None
        if status == 429 or status >= 500:
            retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
            raise FailedTryError(f"status {status} ({self._reason(answer)})", False, retry_after_s)
        if status != 200:
            redirect = " Redirects are not followed; give the URL that they lead to." if 300 <= status < 400 else ""
            raise ConfigError(
                f"{server.url}{path} refused the request with status {status}: {self._reason(answer)}.{redirect}"
            )
        return answer

    def read(self, content: bytes, read: Callable[[bytes], Answer]) -> Answer:
        """What `read` makes of an answer. Its UnfitReplyError quotes the answer, unless that repeats the API key."""
        try:
            return read(content)
        except UnfitReplyError:
            if self._repeats_key(content):
                raise UnfitReplyError("an answer that repeats the API key, and is none that was expected") from None
            raise

    async def _meet_once(self, client: httpx.AsyncClient, server: Server) -> None:
        if not server.is_met:
            await self._meet(client, server)
            server.is_met = True

    async def _next(self, tries: Counter[Server]) -> Server:
        """The least busy server that is awake, of those where the request failed least; else the first to wake."""
        while True:
            now = time.monotonic()
            awake = [server for server in self.all if server.rests_until <= now]
            if awake:
                return min(awake, key=lambda server: (tries[server], server.in_flight, server.sent))
            first = min(self.all, key=lambda server: server.rests_until)
            if first.rests_until - now > MAX_RETRY_AFTER_S:
                raise TryAgainError(
                    f"{first.url}: asks to be left alone for {first.rests_until - now:.0f} s; nothing was published. Run the same command again then."
                )
            await asyncio.sleep(first.rests_until - now)

    def _note_failure(self, server: Server, error: FailedTryError) -> None:
        now = time.monotonic()
        if error.is_down:
            server.is_met = False  # who knows what is started in its place
        if server.rests_until > now:  # the same trouble as the failure that sent it to rest
            server.rests_until = max(server.rests_until, now + error.retry_after_s)
            return
        server.failures += 1
        if error.is_down or error.retry_after_s or server.failures >= FAILURES_BEFORE_REST:
            rest_s = max(error.retry_after_s, self._delay_s(server.failures - 1))
            server.rests_until = now + rest_s
            log.warning("score   %s rests %.1f s | %s", server.url, rest_s, error)

    def _delay_s(self, attempt: int) -> float:
        """Exponential back-off with jitter, so that the requests that failed together do not come back together."""
        return min(MAX_DELAY_S, self.options.retry_base_delay_s * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.5)

    def _reason(self, content: bytes) -> str:
        """What a server says of an error: its message where it has one, else the text."""
        try:
            found = decoded(content)
        except UnfitReplyError:
            found = content.decode(errors="replace")
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        return self.one_line(str(found)) or "no reason given"

    def one_line(self, text: str) -> str:
        """Fit for a log: no key (some servers repeat it), no control characters, not too long."""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return self.redacted(text)[:REASON_CHARS].rstrip(". ")

    def redacted(self, text: str) -> str:
        """Without the key, which a server may give as the name of anything."""
        return text.replace(self._key, "***") if self._key else text

    def _repeats_key(self, content: bytes) -> bool:
        """Also where JSON's escapes spell it."""
        if not self._key:
            return False
        try:
            text = json.dumps(decoded(content), ensure_ascii=False)
        except (UnfitReplyError, RecursionError):
            text = ""
        return self._key.encode() in content or json.dumps(self._key)[1:-1] in text


async def _read_whole(response: httpx.Response) -> bytes:
    """The answer, unpacked. Raises UnfitReplyError where it is longer than any that is one: packed zeros have no end."""
    pieces, length = [], 0
    async for piece in response.aiter_bytes():
        length += len(piece)
        if length > LONGEST_ANSWER:
            raise UnfitReplyError(f"an answer of more than {LONGEST_ANSWER >> 20} MiB")
        pieces.append(piece)
    return b"".join(pieces)


def _key_of(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        what = "is not set" if not key else "holds what no HTTP header can"
        raise ConfigError(f"score.http.api_key_env = {variable!r}: that environment variable {what}.")
    return key


def _retry_after_s(value: str | None) -> float:
    """Seconds, or a date as HTTP writes it; 0 where there is none."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date; a date without a zone; the year 10**20
        return 0.0
