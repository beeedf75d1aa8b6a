"""Servers that answer anything at all: no number is taken that the answer does not give for just that token."""

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doors import bounded, examples, refusal
from fault_log import FaultLog, SilentError
from helpers import save_model, tiny_qwen2
from hypothesis import given
from hypothesis import strategies as st
from served_teacher import Handler, ServedTeacher, request

from opd_cache.config import HttpOptions, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError, OpdCacheError, TryAgainError
from opd_cache.score.scorers import http_servers
from opd_cache.score.scorers.http import HTTPScorer
from opd_cache.score.scores import TokenScores, UnfitScoresError

ROW = "hostile server replies"
KEY = "sk-hunter2/with+slash"
ROWS = [request(key, range(5, 8 + key), range(20, 25)) for key in range(3)]
TABLE = np.log(np.random.default_rng(3).dirichlet(np.ones(258), 258))
Change = Callable[[bytes], tuple[int, dict[str, str], bytes]]


def as_it_is(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, content


class ChangingHandler(Handler):
    """Changes what a good server says: of scores, or with changes_models of the models that it serves."""

    def _answer_bytes(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        server = self.server
        if (self.command == "GET") != server.changes_models:
            if self.command == "POST":
                server.said.append(content)
            super()._answer_bytes(status, content, length, **headers)
            return
        status, headers, content = server.change(content)
        if self.command == "POST":
            server.said.append(content)
        lines = [f"{name}: {value}\r\n" for name, value in {"Content-Length": str(len(content)), **headers}.items()]
        with suppress(OSError):
            self.wfile.write(f"HTTP/1.1 {status} Said\r\n{''.join(lines)}\r\n".encode() + content)
            self.wfile.flush()
        self.close_connection = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_qwen2(seed=4), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def server() -> Iterator[ServedTeacher]:
    with ServedTeacher(lambda ids: TABLE[ids], "vllm_generate") as served:
        served.RequestHandlerClass = ChangingHandler
        served.change, served.changes_models, served.said = as_it_is, False, []
        yield served


def scored(
    faults: FaultLog, fault: str, folder: Path, server: ServedTeacher, change: Change, top_k: int = 3
) -> OpdCacheError | None:
    """The error that the servers' answers end in; else they were right."""
    server.change, server.said = change, []
    options = HttpOptions(
        urls=[server.url], api="vllm_generate", concurrency=1, timeout_s=5.0, max_retries=1, retry_base_delay_s=0.001,
        api_key_env="DOORS_KEY",
    )  # fmt: skip
    scorer = HTTPScorer(TeacherConfig(model=str(folder)), ScoreConfig(scorer="http", top_k=top_k, http=options))
    with faults.trial(ROW, fault), bounded():
        error: Exception | None = None
        found: list[TokenScores] = []
        try:
            found = list(scorer.score(ROWS, top_k))
        except (UnfitScoresError, ConfigError, TryAgainError) as refused:
            error = refused
        assert KEY not in str(error)
        for scores in found:
            if scores.error is None and not any(is_said(scores, content) for content in server.said):
                raise SilentError(f"{scores} is in no answer")
    return error if isinstance(error, OpdCacheError) else None


def is_said(scores: TokenScores, content: bytes) -> bool:
    """Whether an answer says these numbers of the tokens that were sent, by a reading of its own."""
    row = ROWS[scores.key]
    try:
        entries = json.loads(content)["prompt_logprobs"]
        if len(entries) != row.num_tokens:
            return False
        said = entries[len(row.prompt_ids) :]
        own = [entry[str(token)]["logprob"] for entry, token in zip(said, row.response_ids, strict=True)]
        others = [
            np.float32(entry[str(name)]["logprob"]) == value
            for entry, names, values in zip(said, scores.topk_ids, scores.topk_logprobs, strict=True)
            for name, value in zip(names, values, strict=True)
        ]
        own_R = np.array(own, np.float32)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return all(others) and np.array_equal(own_R, scores.logprobs) and bool((scores.logprobs <= 0).all())


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOORS_KEY", KEY)


def test_an_answer_as_it_should_be_is_taken(faults: FaultLog, folder: Path, server: ServedTeacher) -> None:
    assert scored(faults, "none", folder, server, as_it_is) is None
    assert len(server.said) == len(ROWS)


@examples(60, 4000)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_changed_bytes_are_never_another_tokens_number(
    faults: FaultLog, folder: Path, server: ServedTeacher, seed: int, changes: int
) -> None:
    rng = random.Random(seed)

    def change(content: bytes) -> tuple[int, dict[str, str], bytes]:
        data = bytearray(content)
        for _ in range(changes):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 60)]
            elif kind == 2:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(1, 60)]
            else:
                del data[max(1, at) :]
        return 200, {}, bytes(data)

    scored(faults, "changed bytes", folder, server, change)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, -1e-320, "7"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@examples(80, 5000)
@given(seed=st.integers(0, 2**32), value=json_values)
def test_changed_json_is_never_another_tokens_number(
    faults: FaultLog, folder: Path, server: ServedTeacher, seed: int, value: object
) -> None:
    rng = random.Random(seed)

    def change(content: bytes) -> tuple[int, dict[str, str], bytes]:
        reply = json.loads(content)
        place: Any = {"reply": reply}
        key: Any = "reply"
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        kind = rng.randrange(5) if place is not reply or key != "reply" else 0
        if kind == 0 or not isinstance(place, list):
            place[key] = value
        elif kind == 1:
            del place[key]
        elif kind == 2:
            place.insert(key, place[rng.randrange(len(place))])
        elif kind == 3:
            place[:] = [*place[1:], place[0]]
        else:
            rng.shuffle(place)
        return 200, {}, json.dumps(place if kind == 0 and key == "reply" else reply).encode()

    scored(faults, "changed JSON", folder, server, change)


@examples(20, 3000)
@given(value=json_values, raw=st.none() | st.binary(max_size=60))
def test_anything_said_of_the_models_is_taken_or_one_line(
    faults: FaultLog, folder: Path, server: ServedTeacher, value: object, raw: bytes | None
) -> None:
    server.changes_models = True
    for reply in (
        value,
        {"data": value},
        {"data": [value]},
        {"data": [{"id": value, "root": value, "max_model_len": value}]},
    ):
        content = raw if raw is not None else json.dumps(reply).encode()
        scored(faults, "anything for models", folder, server, lambda _, content=content: (200, {}, content))


def bomb(content: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * (8 << 20) + content)


HOSTILE: dict[str, Change] = {
    "packed spaces": bomb,
    "packed garbage": lambda content: (200, {"Content-Encoding": "gzip"}, content),
    "packed twice": lambda content: (200, {"Content-Encoding": "deflate, deflate"}, zlib.compress(zlib.compress(bytes(99)))),
    "an unknown packing": lambda content: (200, {"Content-Encoding": "snappy"}, content),
    "no length": lambda content: (200, {"Content-Length": "-5"}, content),
    "two lengths": lambda content: (200, {"Content-Length": "5, 6"}, content),
    "too long a length": lambda content: (200, {"Content-Length": "9" * 40}, content),
    "half a chunk": lambda content: (200, {"Content-Length": "5", "Transfer-Encoding": "chunked"}, b"ffffffff\r\nabc"),
    "a header of 1 MB": lambda content: (200, {"X-Long": "x" * 1_000_000}, content),
    "a header with escapes": lambda content: (400, {"X-\x1b[31m": "\x1b[31m"}, b"\x1b[31mno\r\n\x1b]0;title\x07"),
    "status 999": lambda content: (999, {}, content),
    "status 100": lambda content: (100, {}, content),
    "a redirect to a file": lambda content: (302, {"Location": "file:///etc/passwd"}, b""),
    "a redirect to itself": lambda content: (307, {"Location": "/inference/v1/generate"}, b""),
    "status 204": lambda content: (204, {}, b""),
    "deep lists": lambda content: (200, {}, b"[" * 200_000),
    "lists just deep enough": lambda content: (200, {}, b'{"prompt_logprobs": ' + b"[" * 940 + b"]" * 940 + b"}"),
    "5000 digits": lambda content: (200, {}, content.replace(b"-", b"-" + b"9" * 5000, 1)),
    "UTF-16": lambda content: (200, {}, content.decode().encode("utf-16")),
    "half a pair": lambda content: (200, {}, b'{"prompt_logprobs": "\\ud800"}'),
    "the key": lambda content: (200, {}, json.dumps({"prompt_logprobs": KEY}).encode()),
    "the key in escapes": lambda content: (200, {}, json.dumps({"prompt_logprobs": [KEY]}).replace("/", "\\/").encode()),
    "the key as model": lambda content: (200, {}, json.dumps({"model": KEY}).replace("h", "\\u0068").encode()),
    "the key refused": lambda content: (401, {}, json.dumps({"error": f"bad key {KEY}"}).replace("/", "\\/").encode()),
    "the key in control characters": lambda content: (400, {}, f"bad {KEY[:6]}\0{KEY[6:]} {KEY}\n".encode()),
    "later for ever": lambda content: (429, {"Retry-After": "9" * 400}, b""),
    "later in another era": lambda content: (503, {"Retry-After": f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"}, b""),
    "later in another zone": lambda content: (503, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, b""),
    "later, not at all": lambda content: (503, {"Retry-After": "\u0661 nan"}, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("of_models", [False, True], ids=["scores", "models"])
def test_a_hostile_answer_is_one_line(
    faults: FaultLog, folder: Path, server: ServedTeacher, monkeypatch: pytest.MonkeyPatch, name: str, of_models: bool
) -> None:
    monkeypatch.setattr(http_servers, "LONGEST_ANSWER", 1 << 20)
    server.changes_models = of_models
    with refusal() as said:
        error = scored(faults, f"{name}{' for models' if of_models else ''}", folder, server, HOSTILE[name])
        if error is not None:
            raise error
    assert KEY not in "".join(said)


def test_names_of_models_reach_no_terminal(
    faults: FaultLog, folder: Path, server: ServedTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    card = {"id": f"teacher\n\x1b]0;owned\x07{KEY}", "root": "r" * 100_000}
    server.changes_models = True
    scored(
        faults,
        "escapes and the key as a model's name",
        folder,
        server,
        lambda _: (200, {}, json.dumps({"data": [card]}).encode()),
    )
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("opd_cache"))
    assert "teacher" in said
    assert "\x1b" not in said
    assert KEY not in said
    assert len(said) < 2000
