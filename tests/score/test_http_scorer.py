"""The HTTP scorer against real servers on the loopback: what is asked, what is believed, what is asked again.

A tiny real model computes; the numbers are compared with a plain log-softmax of it.
"""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from served_shapes import PATHS
from served_teacher import LogprobsOf, ServedTeacher, always, first_time, request, requests, same, score

from opd_cache.score.scorers.http import HTTPScorer
from opd_cache.score.scores import ScoreRequest, UnfitScoresError

APIS = sorted(PATHS)


def expected_logprobs(logprobs_of: LogprobsOf, row: ScoreRequest) -> np.ndarray:
    """[R, V]: row t is of response token t given all before it."""
    start = len(row.prompt_ids) - 1
    return logprobs_of([*row.prompt_ids.tolist(), *row.response_ids.tolist()])[start:-1]


# Numbers


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("order", ["ranked", "reversed"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_scores_of_every_dialect_equal_a_plain_log_softmax(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, api: str, order: str, top_k: int
) -> None:
    rows = requests(14)
    with ServedTeacher(logprobs_of, api, top_order=order) as server:
        found = score(scorer_of(server.url, api=api, top_k=top_k), rows, top_k)
    for row, scores in zip(rows, found, strict=True):
        if len(row.response_ids) == 0:
            assert (scores.logprobs.shape, scores.topk_ids.shape, scores.error) == ((0,), (0, top_k), None)
            continue
        plain = expected_logprobs(logprobs_of, row)
        own = np.take_along_axis(plain, row.response_ids[:, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(scores.logprobs, own, atol=1e-5, rtol=0)
        best = np.argsort(-plain, axis=1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(scores.topk_ids, best)
        np.testing.assert_allclose(scores.topk_logprobs, np.take_along_axis(plain, best, 1), atol=1e-5, rtol=0)
        ranks = (plain > own[:, None]).sum(1) + 1
        # SGLang gives no rank: it is known only where the token is among the top k.
        np.testing.assert_array_equal(scores.rank, ranks if api != "sglang" else np.where(ranks <= top_k, ranks, 0))
        assert scores.logprobs.dtype == scores.topk_logprobs.dtype == np.float32


@pytest.mark.parametrize("api", APIS)
def test_each_server_is_asked_as_its_documents_say(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, api: str
) -> None:
    with ServedTeacher(logprobs_of, api) as server:
        score(scorer_of(server.url, api=api), [request(0, [5, 6, 7], []), request(1, [5, 6, 7], [8, 9])], 4)
    bodies = {
        "sglang": {
            "input_ids": [5, 6, 7, 8, 9],
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 2,
            "top_logprobs_num": 4,
            "stream": False,
        },
        "vllm_generate": {
            "model": "teacher",
            "token_ids": [5, 6, 7, 8, 9],
            "sampling_params": {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 4, "detokenize": False},
            "stream": False,
        },
        "vllm_completions": {
            "model": "teacher",
            "prompt": [5, 6, 7, 8, 9],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 4,
            "stream": False,
        },
    }
    assert server.asked == [bodies[api]]  # and nothing for the empty response


@pytest.mark.parametrize("api", APIS)
def test_the_dialect_is_found_out_and_said(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, api: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opd_cache")
    with ServedTeacher(logprobs_of, api) as server:
        scorer = scorer_of(server.url)
        assert scorer.engine == "http"
        scorer.load()
        assert scorer.engine == f"http {api}"
        assert f"{server.url} serves teacher (/models/teacher" in caplog.text
        assert f"| api {api} | context 64" in caplog.text
        assert len(score(scorer, requests(6))) == 6


# What is not believed

UNFIT = {
    "short": "entries, expected|_logprobs has",
    "long": "entries, expected|_logprobs has",
    "shifted": "begins with|has id|the id that was sent is",
    "wrong id": "has id|the id that was sent is",
    "NaN": "its log-prob is nan; a log-prob is finite and at most 0",
    "inf": "its log-prob is inf",
    "-inf": "its log-prob is -inf",
    "-9999": "its log-prob is -9999.0",
    "positive": "its log-prob is 0.25",
    "no number": "its log-prob is None",
    "text": "its log-prob is '-1.5'",
    "true": "its log-prob is True",
    "bad top": "its log-prob is nan",
    "few": "top log-probs, expected 5 or 6 of different ids",
    "more than all probability": "more than all probability|among the top 5|likelier",
    "other model": "the answer is of model 'somebody-else', asked was teacher",
    "half the JSON": "no JSON but '{",
    "HTML": "no JSON but '<html><body>It works!",
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fault", UNFIT)
def test_an_answer_that_is_no_score_is_never_taken(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, api: str, fault: str
) -> None:
    rows = requests(6)[2:]
    bad = [*rows[1].prompt_ids.tolist(), *rows[1].response_ids.tolist()]
    with ServedTeacher(logprobs_of, api, fault=lambda number, ids: fault if ids == bad else None) as server:
        with pytest.raises(UnfitScoresError) as caught:
            list(scorer_of(server.url, api=api).score(rows, 5))
        assert list(caught.value.faults) == [rows[1].key]
        (message,) = caught.value.faults.values()
        assert any(part in message for part in UNFIT[fault].split("|")), message
        assert message.startswith(f"{server.url}: ")
        assert "\n" not in message
        # Asked for once more, and no third time; the others once.
        assert len(server.asked) == len(rows) + 1


@pytest.mark.parametrize("response", [[9, 20, 31], [2, 2, 2]])
def test_the_rank_variant_of_sglangs_documents_is_refused(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, response: list[int]
) -> None:
    with (
        ServedTeacher(logprobs_of, "sglang", fault=always("rank variant")) as server,
        pytest.raises(UnfitScoresError, match=r"response token 1 of 3: has id \d+, sent was"),
    ):
        list(scorer_of(server.url).score([request(0, [5, 6], response)], 0))


@pytest.mark.parametrize("api", APIS)
def test_one_unfit_answer_is_a_glitch_and_asked_for_again(
    scorer_of: Callable[..., HTTPScorer], logprobs_of: LogprobsOf, api: str
) -> None:
    rows = requests(8)
    with ServedTeacher(logprobs_of, api) as server:
        expected = score(scorer_of(server.url, api=api), rows, 3)
    with ServedTeacher(logprobs_of, api, fault=first_time("NaN", "HTML", "shifted")) as server:
        # None of its retries is used up by it.
        assert same(score(scorer_of(server.url, api=api, max_retries=0), rows, 3), expected)
