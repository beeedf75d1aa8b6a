"""One response for the token view: lists side by side, token texts told once."""

from typing import Any

from opd_cache.errors import ConfigError
from opd_cache.inspection.read import Response, Wanted, read_responses, teachers_of
from opd_cache.report.live import RunState

DECIMALS = 5  # of a log-prob, nats


def response_of(state: RunState, episode: int, rollout: str, teacher: str | None) -> Response:
    """Raises ConfigError where it is not scored."""
    from opd_cache.store.query import stopped_after

    cursor = state.cursor()
    with stopped_after(cursor, state.limits.timeout_s):
        return read_responses(cursor, Wanted(rollout, episode, teacher=teacher))[0]


def response_page(state: RunState, episode: int, rollout: str, teacher: str | None) -> dict[str, Any]:
    """The response, who else scored it, and all samples of its prompt."""
    response = response_of(state, episode, rollout, teacher)
    return {
        **response_lists(response),
        "teachers": teachers_of(state.cursor(), response),
        "siblings": siblings(state, response.prompt_index, response.teacher),
    }


def response_lists(response: Response, max_tokens: int | None = None, max_topk: int | None = None) -> dict[str, Any]:
    """Its scalars and `tokens`, one list a column; `texts` has the text of every id that they name.

    Entries are null where a token is not scored. With the limits only so many tokens and alternatives are kept.
    """
    scalars = {name: getattr(response, name) for name in Response.__dataclass_fields__ if name != "tokens"}
    tokens = response.tokens[:max_tokens]
    listed = [token.topk[:max_topk] for token in tokens]
    texts = {token.token_id: token.text for token in tokens}
    texts |= {one.token_id: one.text for topk in listed for one in topk}
    return {
        **scalars,
        "tokens": {
            "id": [token.token_id for token in tokens],
            "student": [_rounded(token.student_logprob) for token in tokens],
            "teacher": [_rounded(token.teacher_logprob) for token in tokens],
            "rank": [token.teacher_rank for token in tokens],
            "entropy": [_rounded(token.teacher_entropy) for token in tokens],
            "topk_ids": [[one.token_id for one in topk] for topk in listed],
            "topk_logprobs": [[_rounded(one.logprob) for one in topk] for topk in listed],
        },
        "texts": texts,
    }


def siblings(state: RunState, prompt_index: int, teacher: str) -> list[dict[str, Any]]:
    """All samples of a prompt that a teacher scored, episode by episode."""
    return state.rows(
        f"SELECT episode, rollout_id, teacher, sample_index, num_response_tokens, finish_reason, reverse_kl_mean FROM {state.keep('sample_rows')} WHERE prompt_index = ? AND teacher = ? ORDER BY episode, sample_index",
        [prompt_index, teacher],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DECIMALS)


def checked_place(episode: str, rollout: str) -> tuple[int, str]:
    """(episode, rollout id) of a request. Raises ConfigError."""
    if not episode.isdecimal() or len(episode) > 9 or not rollout:
        raise ConfigError(
            f"episode = {episode[:40]!r}, rollout = {rollout[:40]!r}: expected a number and a rollout id."
        )
    return int(episode), rollout
