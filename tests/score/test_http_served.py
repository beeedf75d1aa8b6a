"""What the servers of a teacher must serve, how long a row they take, and the key that they ask for."""

import logging
import time
from collections.abc import Callable, Iterator

import pytest
from served_teacher import LogprobsOf, ServedTeacher, always, request, requests, score

from opd_cache.errors import ConfigError, TryAgainError
from opd_cache.score.scorers.http import HTTPScorer
from opd_cache.score.scores import UnfitScoresError

KEY = "sk-Secret.42_of-the+teacher"
Servers = Callable[..., HTTPScorer]


@pytest.fixture
def server(logprobs_of: LogprobsOf) -> Iterator[ServedTeacher]:
    with ServedTeacher(logprobs_of, "vllm_generate") as served:
        yield served


# What is served


def refused(scorer: HTTPScorer) -> str:
    with pytest.raises(ConfigError) as caught:
        scorer.load()
    return str(caught.value)


def test_another_model_than_the_recipes_is_refused_naming_both(server: ServedTeacher, scorer_of: Servers) -> None:
    assert refused(scorer_of(server.url, model="other")) == (
        f"{server.url} serves 'teacher', but score.http.model = 'other'. Set one of them right."
    )
    scorer_of(server.url, model="teacher").load()


def test_of_several_served_models_the_recipe_has_to_choose(server: ServedTeacher, scorer_of: Servers) -> None:
    adapter = {"id": "tuned", "root": "/adapters/tuned", "parent": "teacher", "max_model_len": None}
    server.cards.append(adapter)
    assert refused(scorer_of(server.url)) == (
        f"{server.url} serves several models: 'teacher', 'tuned'. Choose one with score.http.model."
    )
    scorer = scorer_of(server.url, model="tuned")
    score(scorer, requests(4))
    assert {body["model"] for body in server.asked} == {"tuned"}
    assert scorer.served.context_length == 64  # of its base model


def test_a_server_without_models_is_refused(server: ServedTeacher, scorer_of: Servers) -> None:
    server.cards.clear()
    assert refused(scorer_of(server.url)) == (
        f"{server.url}/v1/models names no model. Is this the root of a teacher's server?"
    )


def test_a_server_that_gives_no_prompt_log_probs_is_refused(server: ServedTeacher, scorer_of: Servers) -> None:
    server.fault = always("HTML")
    message = refused(scorer_of(server.url))
    assert message.startswith(f"{server.url} is no SGLang server, and gives no log-probs of a prompt as vLLM does (")
    assert "/inference/v1/generate: no JSON but '<html>" in message
    assert "/v1/completions is not there" in message


def test_servers_of_one_teacher_must_serve_the_same(logprobs_of: LogprobsOf, scorer_of: Servers) -> None:
    with (
        ServedTeacher(logprobs_of, "sglang") as one,
        ServedTeacher(logprobs_of, "sglang", root="/models/newer") as other,
    ):
        message = refused(scorer_of(one.url, other.url))
    assert message == (
        f"{other.url} serves teacher (/models/newer, version default) | api sglang | context 64, but the teacher is "
        "teacher (/models/teacher, version default) | api sglang | context 64. All its servers must serve the same until it is scored."
    )


def test_a_server_that_comes_late_is_asked_what_it_serves_before_anything_else(
    logprobs_of: LogprobsOf, scorer_of: Servers
) -> None:
    with ServedTeacher(logprobs_of, "sglang", name="somebody-else") as late:
        port = late.server_address[1]
    with ServedTeacher(logprobs_of, "sglang") as one:
        scorer = scorer_of(one.url, late.url, model="teacher")
        scorer.load()
        with ServedTeacher(logprobs_of, "sglang", name="somebody-else", port=port) as late:
            time.sleep(0.02)  # the rest of a server that was not there is over
            with pytest.raises(ConfigError, match=r"serves 'somebody-else', but score\.http\.model = 'teacher'"):
                score(scorer, requests(6))
            assert late.asked == []
            late.cards[0]["id"] = "teacher"
            assert len(score(scorer, requests(40))) == 40
            assert len(late.asked) > 5


def test_a_server_started_again_with_another_model_is_found_out(logprobs_of: LogprobsOf, scorer_of: Servers) -> None:
    with ServedTeacher(logprobs_of, "sglang") as served:
        scorer = scorer_of(served.url)
        assert len(score(scorer, requests(6))) == 6
        port = served.server_address[1]
    with ServedTeacher(logprobs_of, "sglang", root="/models/newer", port=port) as served:
        with pytest.raises(
            ConfigError, match=r"serves teacher \(/models/newer.*but the teacher is teacher \(/models/teacher"
        ):
            score(scorer, requests(6))
        assert served.asked == []


def test_nobody_there_is_try_again(scorer_of: Servers) -> None:
    scorer = scorer_of("http://127.0.0.1:9", max_retries=1)
    with pytest.raises(TryAgainError, match=r"^http://127\.0\.0\.1:9: ConnectError .*No server of the teacher answers"):
        scorer.load()


def test_a_server_that_is_starting_is_waited_for(server: ServedTeacher, scorer_of: Servers) -> None:
    server.fail_gets = 3
    scorer_of(server.url, max_retries=3).load()
    server.fail_gets = 3
    with pytest.raises(TryAgainError, match=r"status 503 \(loading\)"):
        scorer_of(server.url, max_retries=2).load()


def test_the_fingerprint_is_of_the_model_and_not_of_the_place(logprobs_of: LogprobsOf, scorer_of: Servers) -> None:
    def fingerprint(**options: str) -> str:
        with ServedTeacher(logprobs_of, "sglang", **options) as served:  # type: ignore[arg-type]
            return scorer_of(served.url).fingerprint()

    assert fingerprint() == fingerprint()  # on two ports
    assert len({fingerprint(), fingerprint(name="a"), fingerprint(root="/models/b")}) == 3


# Context


@pytest.mark.parametrize("max_model_len", [64, None])
def test_rows_beyond_the_context_are_error_rows_and_never_sent(
    logprobs_of: LogprobsOf,
    scorer_of: Servers,
    max_model_len: int | None,
) -> None:
    """By the server's own limit, else by the model's config.json; one token more must fit, which the server adds."""
    rows = [request(key, range(3, 43), range(100, 100 + length)) for key, length in enumerate((23, 24, 25))]
    rows.append(request(3, [5, 258], [6]))
    with ServedTeacher(logprobs_of, "vllm_completions", max_model_len=max_model_len) as served:
        found = score(scorer_of(served.url, api="vllm_completions"), rows)
        assert [len(body["prompt"]) for body in served.asked] == [63]
    assert [scores.error for scores in found] == [
        None,
        "64 tokens and one to generate, the teacher's context is 64",
        "65 tokens, the teacher's context is 64",
        "token id 258, the teacher has 258 embeddings",
    ]
    assert [len(scores.logprobs) for scores in found] == [23, 0, 0, 0]


def test_the_servers_own_context_counts_more_than_the_models(logprobs_of: LogprobsOf, scorer_of: Servers) -> None:
    with ServedTeacher(logprobs_of, "sglang", max_model_len=10) as served:
        (found,) = score(scorer_of(served.url), [request(0, [5, 6], range(10, 20))])
    assert found.error == "12 tokens, the teacher's context is 10"


def test_more_top_log_probs_than_the_teacher_has_tokens_are_refused(server: ServedTeacher, scorer_of: Servers) -> None:
    assert "has only 258 tokens" in refused(scorer_of(server.url, top_k=300))


# The key


def test_the_key_comes_from_the_environment_and_is_never_shown(
    logprobs_of: LogprobsOf,
    scorer_of: Servers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with ServedTeacher(logprobs_of, "vllm_generate", key=KEY) as served:
        assert "status 401: Incorrect API key provided: None" in refused(scorer_of(served.url))
        assert "api_key_env = 'TEACHER_KEY': that environment variable is not set" in refused(
            scorer_of(served.url, api_key_env="TEACHER_KEY")
        )
        monkeypatch.setenv("TEACHER_KEY", KEY)
        assert len(score(scorer_of(served.url, api_key_env="TEACHER_KEY"), requests(6))) == 6
        # Servers that repeat the key in their reason
        served.fault = always("400")
        with pytest.raises(ConfigError, match=r"status 400: bad request, key Bearer \*\*\*\.$"):
            score(scorer_of(served.url, api="vllm_generate", api_key_env="TEACHER_KEY"), requests(6))
        # and in a page
        served.fault = always("page with key")
        with pytest.raises(UnfitScoresError, match="an answer that repeats the API key, and is none that was expected"):
            score(scorer_of(served.url, api="vllm_generate", api_key_env="TEACHER_KEY"), requests(6))
        served.key = "another"
        message = refused(scorer_of(served.url, api_key_env="TEACHER_KEY"))
        assert "Incorrect API key provided: Bearer ***" in message
    assert KEY not in caplog.text


def test_a_key_that_no_header_can_hold_is_refused_unseen(
    server: ServedTeacher,
    scorer_of: Servers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key in (f"{KEY}\n", f" {KEY}", f"{KEY}é"):
        monkeypatch.setenv("TEACHER_KEY", key)
        message = refused(scorer_of(server.url, api_key_env="TEACHER_KEY"))
        assert message.endswith("'TEACHER_KEY': that environment variable holds what no HTTP header can.")
