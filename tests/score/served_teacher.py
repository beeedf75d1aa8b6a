"""A teacher behind a real HTTP server on the loopback that speaks as SGLang or vLLM does, with faults on demand."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from served_shapes import PATHS, SHAPES, entries_of, spoiled, top_k_of

from opd_cache.score.scores import Scorer, ScoreRequest, TokenScores

LogprobsOf = Callable[[list[int]], np.ndarray]  # ids [T] -> log-probs [T, V]; row i is of the token after ids[i]
FaultOf = Callable[[int, list[int]], str | None]  # (number of the scoring request, from 0; its ids) -> a fault's name


def request(key: int, prompt: Sequence[int], response: Sequence[int]) -> ScoreRequest:
    return ScoreRequest(key, np.array(prompt, np.int32), np.array(response, np.int32), key // 2)


def requests(number: int) -> list[ScoreRequest]:
    """Prompts of one token and more, and an empty and a one-token response among the first."""
    rng = np.random.default_rng(0)
    lengths = [0, 1, 9, *rng.integers(1, 20, number)]
    return [
        request(key, rng.integers(3, 258, 1 + key % 7).tolist(), rng.integers(3, 258, lengths[key]).tolist())
        for key in range(number)
    ]


def always(*names: str | None) -> FaultOf:
    """The n-th request gets the n-th fault, and all later ones the last."""
    return lambda number, ids: names[min(number, len(names) - 1)]


def first_time(*names: str) -> FaultOf:
    """The n-th sequence gets the n-th fault when it is first asked for; asked again, it is answered."""
    seen: dict[tuple[int, ...], str | None] = {}
    faults = iter(names)

    def fault(number: int, ids: list[int]) -> str | None:
        if tuple(ids) in seen:
            return None
        return seen.setdefault(tuple(ids), next(faults, None))

    return fault


def score(scorer: Scorer, rows: Sequence[ScoreRequest], top_k: int = 0) -> list[TokenScores]:
    found = list(scorer.score(rows, top_k))
    assert sorted(scores.key for scores in found) == [row.key for row in rows]
    return sorted(found, key=lambda scores: scores.key)


def same(found: Sequence[TokenScores], expected: Sequence[TokenScores]) -> bool:
    """Whether two lists of scores are bit for bit the same."""
    return len(found) == len(expected) and all(
        one.key == other.key
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("logprobs", "rank", "topk_ids", "topk_logprobs")
        )
        for one, other in zip(found, expected, strict=True)
    )


class ServedTeacher(ThreadingHTTPServer):
    """`with ServedTeacher(logprobs_of, "sglang") as server:`; `server.url` is its root, `server.asked` what it was sent."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        logprobs_of: LogprobsOf,
        api: str,
        fault: FaultOf = lambda number, ids: None,
        name: str = "teacher",
        root: str = "/models/teacher",
        max_model_len: int | None = 64,
        key: str | None = None,
        retry_after: str | None = None,
        top_order: str = "ranked",
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.logprobs_of, self.api, self.fault, self.key = logprobs_of, api, fault, key
        self.name, self.root, self.max_model_len = name, root, max_model_len
        self.retry_after, self.top_order = retry_after, top_order
        self.cards: list[dict[str, Any]] = [{"id": name, "root": root, "max_model_len": max_model_len}]
        self.asked: list[dict[str, Any]] = []
        self.seen_paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.fail_gets = 0  # so many questions for the model are answered by status 503
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "ServedTeacher":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: ServedTeacher

    def log_message(self, *arguments: object) -> None:
        pass

    def parse_request(self) -> bool:
        """Plain headers only: the usual parser of mail headers takes as long as all the rest."""
        self.command, self.path, self.request_version = self.raw_requestline.decode().split()
        self.requestline, self.headers = self.path, {}  # type: ignore[assignment]
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(": ")
            self.headers[name.title()] = value
        self.close_connection = False
        return True

    def do_GET(self) -> None:
        server = self.server
        server.seen_paths.append(self.path)
        if not self._is_allowed():
            return
        if server.fail_gets > 0:
            server.fail_gets -= 1
            self.refuse(503, "loading")
        elif self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": server.cards})
        elif self.path == "/get_model_info" and server.api == "sglang":
            self._answer(200, {"model_path": server.root, "is_generation": True, "weight_version": "default"})
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        server.seen_paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        if self.path != PATHS[server.api]:
            self._answer(404, {"detail": "Not Found"})
            return
        with server.lock:
            number = len(server.asked)
            server.asked.append(body)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            ids = body.get("input_ids") or body.get("token_ids") or body["prompt"]
            self._score(ids, body, server.fault(number, ids))
        finally:
            with server.lock:
                server.in_flight -= 1

    def _is_allowed(self) -> bool:
        key, sent = self.server.key, self.headers.get("Authorization")
        if key is None or sent == f"Bearer {key}":
            return True
        self._answer(401, {"error": {"message": f"Incorrect API key provided: {sent}", "code": 401}})
        return False

    def _score(self, ids: list[int], body: dict[str, Any], fault: str | None) -> None:
        if fault in HTTP_FAULTS:
            HTTP_FAULTS[fault](self)
            return
        entries = spoiled(entries_of(self.server.logprobs_of(ids), ids, top_k_of(body)), fault)
        if self.server.top_order == "reversed":
            entries = [entry and {**entry, "top": entry["top"][::-1]} for entry in entries]
        reply = SHAPES[self.server.api](entries, body)
        if fault == "other model":
            reply["model"] = "somebody-else"
        elif fault == "rank variant":
            rows = reply["meta_info"]["input_token_logprobs"]
            for row, entry in zip(rows[1:], entries[-len(rows) + 1 :], strict=True):
                row[1:] = [entry["rank"], str(entry["id"])]
        content = json.dumps(reply).encode()
        self._answer_bytes(200, content[: len(content) // 2] if fault == "half the JSON" else content)

    def _answer(self, status: int, reply: dict[str, Any], **headers: str) -> None:
        self._answer_bytes(status, json.dumps(reply).encode(), **headers)

    def _answer_bytes(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    # What happens instead of an answer

    def lose_connection(self) -> None:
        self.close_connection = True

    def lose_connection_midway(self) -> None:
        self._answer_bytes(200, b'{"choices": [', length=10_000)
        self.close_connection = True

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self._answer(status, {"error": {"message": message}}, **headers)

    def be_busy(self) -> None:
        retry_after = self.server.retry_after
        self.refuse(429, "too many requests", **({} if retry_after is None else {"Retry_After": retry_after}))

    def be_slow(self) -> None:
        time.sleep(0.6)
        self.close_connection = True

    def dribble(self) -> None:
        """A byte now and then: no single read ever waits long."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.03)

    def redirect(self) -> None:
        self._answer(307, {}, Location="http://127.0.0.1:9/elsewhere")

    def show_a_page(self) -> None:
        self._answer_bytes(200, b"<html><body>It works!</body></html>")


HTTP_FAULTS: dict[str | None, Callable[[Handler], None]] = {
    "lost": Handler.lose_connection,
    "lost midway": Handler.lose_connection_midway,
    "429": Handler.be_busy,
    "500": lambda handler: handler.refuse(500, "CUDA error: out of memory\nsee the log"),
    "503": lambda handler: handler.refuse(503, "loading"),
    "slow": Handler.be_slow,
    "dribble": Handler.dribble,
    "400": lambda handler: handler.refuse(400, f"bad request, key {handler.headers.get('Authorization')}"),
    "redirect": Handler.redirect,
    "HTML": Handler.show_a_page,
    "page with key": lambda handler: handler._answer_bytes(200, f"<html>{handler.headers['Authorization']}".encode()),
}
