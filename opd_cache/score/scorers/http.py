"""Scoring by a teacher behind servers: token ids go out, log-probs of the same ids come back or nothing is stored.

This is the life of a scoring window. Who is asked and asked again: http_servers.py. What a server serves:
http_served.py. What goes over the wire: http_shapes.py.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

import httpx

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.fingerprint import context_length, model_folder, num_embeddings
from opd_cache.score.scorers.http_served import Served, describe
from opd_cache.score.scorers.http_servers import Server, Servers
from opd_cache.score.scorers.http_shapes import DIALECTS, UnfitReplyError, reader
from opd_cache.score.scores import ScoreRequest, TokenScores, UnfitScoresError, no_scores
from opd_cache.stall import note_progress

log = logging.getLogger(__name__)


class HTTPScorer:
    """A teacher that others serve. Here are only its tokenizer and its configuration."""

    dtype = "served"  # what a server computes in is its own affair, and it does not tell

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        self.teacher, self.options = teacher, options
        self.engine = "http"
        # At its end the servers idle until the last request is answered: a window is long against what is in flight.
        self.window = max(512, 8 * options.http.concurrency)
        self.servers = Servers(teacher.urls or options.http.urls or [], options.http, self._meet)
        self._served: Served | None = None
        self._vocab_size = 0
        self._context_length: int | None = None  # by its config.json, where the servers do not tell

    def fingerprint(self) -> str:
        """Digest of the served model's name and of what the server says that it has loaded; never of where it is."""
        self._served = None
        asyncio.run(self._meet_servers(retries=0))
        identity = ["served", self.served.name, self.served.root, self.served.version]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def close(self) -> None:
        """The teacher's memory is its servers'."""

    def load(self) -> None:
        if self._vocab_size:
            return
        if self._served is None:
            asyncio.run(self._meet_servers(self.options.http.max_retries))
        folder = model_folder(self.teacher, with_weights=False)
        vocab_size = num_embeddings(folder)
        if self.options.top_k > vocab_size:
            raise ConfigError(
                f"score.top_k = {self.options.top_k}, but teacher {self.teacher.model!r} has only {vocab_size} tokens."
            )
        self._context_length = context_length(folder)
        self._vocab_size = vocab_size

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        """One TokenScores a request. Rows that the servers could not take get an error without being sent.

        Raises UnfitScoresError, TryAgainError, ConfigError; then no row of the window counts.
        """
        self.load()
        scorable = []
        for request in requests:
            if len(request.response_ids) == 0:
                yield no_scores(request.key, top_k)
            elif (error := self._unfit(request)) is not None:
                yield no_scores(request.key, top_k, error)
            else:
                scorable.append(request)
        if scorable:
            yield from asyncio.run(self._score_window(scorable, top_k))

    def _unfit(self, request: ScoreRequest) -> str | None:
        """Why a server could not take this row."""
        limit, length = self.served.context_length or self._context_length, request.num_tokens
        # Every server wants room for one token more, which vLLM generates and SGLang refuses to do without.
        if limit is not None and length + 1 > limit:
            return (
                f"{length} tokens{' and one to generate' if length == limit else ''}, the teacher's context is {limit}"
            )
        largest = max(request.prompt_ids.max(), request.response_ids.max())
        if largest >= self._vocab_size:
            return f"token id {largest}, the teacher has {self._vocab_size} embeddings"
        return None

    async def _score_window(self, requests: Sequence[ScoreRequest], top_k: int) -> list[TokenScores]:
        """All scores of a window, as they come. The first error that ends the stage ends all that is in flight."""
        waiting = iter(requests)  # in the given order: neighbours share a prompt, which a server may have cached
        found: list[TokenScores] = []
        faults: dict[int, str] = {}

        async def work() -> None:
            async with self.servers.client() as client:
                for request in waiting:
                    try:
                        found.append(await self._score_one(client, request, top_k))
                        note_progress("an answer of the teacher's servers")
                    except UnfitReplyError as error:
                        faults[request.key] = str(error)

        # A server may have been started again with another model; not every answer tells of which model it is.
        await self._meet_servers(self.options.http.max_retries)
        await asyncio.gather(*(work() for _ in range(min(self.options.http.concurrency, len(requests)))))
        if faults:
            raise UnfitScoresError(dict(sorted(faults.items())))
        return found

    async def _score_one(self, client: httpx.AsyncClient, request: ScoreRequest, top_k: int) -> TokenScores:
        served = self.served
        dialect = DIALECTS[served.api]
        content = json.dumps(dialect.body(request, top_k, served.name)).encode()
        read = reader(dialect, request, top_k, served.names)
        return await self.servers.ask(client, dialect.path, content, read)

    @property
    def served(self) -> Served:
        """What the servers serve; they have to be met first."""
        assert self._served is not None
        return self._served

    async def _meet_servers(self, retries: int) -> None:
        async with self.servers.client() as client:
            await self.servers.meet_all(client, retries)

    async def _meet(self, client: httpx.AsyncClient, server: Server) -> None:
        options = self.options.http
        api = options.api if self._served is None else self._served.api
        try:
            served = await describe(self.servers, client, server, api, options.model)
        except ConfigError as error:
            raise ConfigError(self.servers.redacted(str(error))) from None
        if self._served is None:
            self._served = served
            self.engine = f"http {served.api}"
            log.info("score   %s serves %s", server.url, self.servers.one_line(str(served)))
        elif served != self._served:
            raise ConfigError(
                f"{server.url} serves {self.servers.one_line(str(served))}, but the teacher is {self.servers.one_line(str(self._served))}. All its servers must serve the same until it is scored."
            )
