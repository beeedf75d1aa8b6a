"""What is asked again, of whom and when, and what is given up."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from failing_server import bigram_logprobs
from served_teacher import LogprobsOf, ServedTeacher, always, request, requests, same, score

from opd_cache.errors import ConfigError, TryAgainError
from opd_cache.score.scorers.http import HTTPScorer


@pytest.mark.parametrize("fault", ["lost", "lost midway", "429", "500", "503", "slow", "dribble"])
def test_a_passing_fault_changes_nothing(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, fault: str
) -> None:
    rows = requests(8)
    with ServedTeacher(logprobs_of, "vllm_generate") as server:
        expected = score(scorer_of(server.url), rows)
    with ServedTeacher(logprobs_of, "vllm_generate", fault=always(None, fault, fault, None)) as server:
        assert same(score(scorer_of(server.url, api="vllm_generate", timeout_s=0.3), rows), expected)
        assert len(server.asked) == 7 + 2


@pytest.mark.parametrize("fault", ["lost", "429", "500", "slow"])
def test_a_lasting_fault_ends_with_try_again_and_the_servers_name(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, fault: str
) -> None:
    with ServedTeacher(logprobs_of, "sglang", fault=always(fault)) as server:
        scorer = scorer_of(server.url, max_retries=2, timeout_s=0.2)
        with pytest.raises(TryAgainError) as caught:
            list(scorer.score([request(0, [5], [6])], 0))
    what = {
        "lost": "RemoteProtocolError Server disconnected without sending a response",
        "429": "status 429 (too many requests)",
        "500": "status 500 (CUDA error: out of memory see the log)",
        "slow": "no answer in 0.2 s",
    }
    assert str(caught.value) == (
        f"{server.url}/generate: {what[fault]}, the last of 3 tries; the shard was not published. "
        "Run the same command again when the teacher's servers answer."
    )
    assert caught.value.exit_status == 75
    assert len(server.asked) == 3


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_waited_for(scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, date: bool) -> None:
    asked_at: list[float] = []

    def fault(number: int, ids: list[int]) -> str | None:
        asked_at.append(time.monotonic())
        return "429" if number == 0 else None

    with ServedTeacher(logprobs_of, "sglang", fault=fault) as server:
        # A date has whole seconds: between one and two from now.
        server.retry_after = formatdate(time.time() + 2, usegmt=True) if date else "1"
        assert len(score(scorer_of(server.url, concurrency=1), requests(5))) == 5
    assert 0.9 <= asked_at[1] - asked_at[0] < 5


def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf
) -> None:
    with (
        ServedTeacher(logprobs_of, "sglang", fault=always("429"), retry_after="3600") as server,
        pytest.raises(TryAgainError, match=r"http://127.0.0.1:\d+: asks to be left alone for 3[56]\d\d s"),
    ):
        list(scorer_of(server.url).score(requests(5), 0))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("400", "/generate refused the request with status 400: bad request, key None."),
        ("redirect", "/generate refused the request with status 307: {}. Redirects are not followed; give the URL that they lead to."),
    ],
)  # fmt: skip
def test_a_refused_request_stops_at_once_with_the_servers_reason(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, fault: str, expected: str
) -> None:
    with ServedTeacher(logprobs_of, "sglang", fault=always(fault)) as server:
        with pytest.raises(ConfigError) as caught:
            list(scorer_of(server.url, concurrency=1).score(requests(6), 0))
        assert str(caught.value) == server.url + expected
        assert len(server.asked) == 1


def test_other_servers_take_over_from_one_that_is_gone_and_from_one_that_is_sick(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, caplog: pytest.LogCaptureFixture
) -> None:
    rows = requests(40)
    with ServedTeacher(logprobs_of, "sglang") as gone:
        pass
    with (
        ServedTeacher(logprobs_of, "sglang") as well,
        ServedTeacher(logprobs_of, "sglang", fault=always("500")) as sick,
    ):
        expected = score(scorer_of(well.url), rows)
        well.asked.clear()
        assert same(score(scorer_of(gone.url, sick.url, well.url, retry_base_delay_s=0.05), rows), expected)
        assert len(well.asked) == 39
    assert f"{gone.url} rests" in caplog.text
    assert f"{sick.url} rests" in caplog.text


def test_servers_share_the_requests_and_no_more_are_in_flight_than_asked_for(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf
) -> None:
    with ServedTeacher(logprobs_of, "sglang") as one, ServedTeacher(logprobs_of, "sglang") as other:
        assert len(score(scorer_of(one.url, other.url, concurrency=6), requests(61))) == 61
    assert len(one.asked) + len(other.asked) == 60
    assert abs(len(one.asked) - len(other.asked)) <= 20
    assert 1 <= one.most_in_flight <= 6 >= other.most_in_flight


# Ten thousand requests, one in twenty of which fails


@pytest.fixture
def failing_server() -> Iterator[subprocess.Popen]:
    """A process of its own, since the server takes as long as the client."""
    command = [sys.executable, str(Path(__file__).parent / "failing_server.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


def test_ten_thousand_rows_through_a_failing_server_are_each_scored_once_and_right(
    scorer_of: Callable[..., HTTPScorer], failing_server: subprocess.Popen, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "opd_cache")
    assert failing_server.stdout is not None
    url = failing_server.stdout.readline().strip()
    tokens = np.random.default_rng(9).integers(3, 258, (10_000, 5))
    rows = [request(key, tokens[key, :2], tokens[key, 2 : 3 + key % 3]) for key in range(10_000)]
    scorer = scorer_of(url, api="sglang", concurrency=8, max_retries=8, retry_base_delay_s=0.001)
    found = list(scorer.score(rows, 0))
    asked, _ = failing_server.communicate()
    assert 400 < int(asked) - 10_000 < 650
    assert len(found) == len({scores.key for scores in found}) == 10_000
    by_key = sorted(found, key=lambda scores: scores.key)
    table = bigram_logprobs()
    with ServedTeacher(lambda ids: table[ids], "sglang") as server:
        assert same(by_key[:300], score(scorer_of(server.url), rows[:300]))
    # All of them against the server's own table: that of token t + 1 given token t.
    before, after = (
        np.concatenate([ids[first : first + 1 + key % 3] for key, ids in enumerate(tokens)]) for first in (1, 2)
    )
    everything = np.concatenate([scores.logprobs for scores in by_key])
    np.testing.assert_array_equal(everything, table[before, after].astype(np.float32))
