"""What servers are sent to score a response, and what of their answers is believed. Pure functions, one dialect each.

An answer is taken only when every check holds: as many entries as tokens, each with the id that was sent, and numbers
that log-probs can be. Position is never trusted alone: some servers leave a token out, or shift by one.
"""

# R response tokens, K teacher top-k, W = K + 1 entries at a position, N all entries of all positions

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from opd_cache.score.scores import ScoreRequest, TokenScores

IMPOSSIBLE = -9999.0  # vLLM's word for -inf, for which JSON has none
SAME_NATS = 1e-3  # one engine's two accounts of one log-prob come from one softmax; this is beyond any rounding
MAX_ID = 2**31 - 1
UNKNOWN = MAX_ID  # a rank that the server does not say; sorts last
SHOWN_CHARS = 80
# A whole answer in the place of a number may be too long, or too deep, to be written out.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 4, 12, 12, 2 * SHOWN_CHARS, 80


class UnfitReplyError(Exception):
    """An answer that is no scores of the response that was sent; says what is wrong with it."""


class Position(NamedTuple):
    """What a server says of one response token, and of the likeliest tokens at its position, in any order."""

    logprob: Any
    rank: Any  # 1 = likeliest; None: the server does not say
    ids: list[Any]  # K, or K + 1 where the response token is beside the K likeliest
    logprobs: list[Any]
    ranks: list[Any]


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked and understood."""

    path: str
    body: Callable[[ScoreRequest, int, str], dict[str, Any]]  # (request, top_k, name of the served model)
    positions: Callable[[dict[str, Any], ScoreRequest, int], Iterator[Position]]  # numbers are not checked yet


def decoded(content: bytes) -> Any:
    """The JSON of an answer. Raises UnfitReplyError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnfitReplyError(f"no JSON but {shown(content[:SHOWN_CHARS].decode(errors='replace'))}") from error


def reader(
    dialect: Dialect, request: ScoreRequest, top_k: int, names: frozenset[str]
) -> Callable[[bytes], TokenScores]:
    """What makes scores of an answer to a request, or raises UnfitReplyError."""
    return lambda content: parse(dialect, decoded(content), request, top_k, names)


def parse(dialect: Dialect, reply: Any, request: ScoreRequest, top_k: int, names: frozenset[str]) -> TokenScores:
    """The scores in an answer. `names`: all names of the served model. Raises UnfitReplyError."""
    if not isinstance(reply, dict):
        raise UnfitReplyError(f"expected a JSON object, found {shown(reply)}")
    if reply.get("model") not in (None, *names):
        raise UnfitReplyError(f"the answer is of model {shown(reply['model'])}, asked was {' or '.join(sorted(names))}")
    positions = list(dialect.positions(reply, request, top_k))
    everywhere = np.arange(len(positions))
    own_R = _logprobs([position.logprob for position in positions], everywhere)
    ids_RK, logprobs_RK = _top(positions, own_R, request.response_ids, top_k)
    said_R = _ranks([position.rank for position in positions], everywhere)
    # Where the server does not say: 1 + the likelier ones where the token is in the top K; else 0, unknown.
    is_listed_R = (ids_RK == request.response_ids[:, None]).any(1)
    counted_R = np.where(is_listed_R, 1 + (logprobs_RK > own_R[:, None]).sum(1), 0)
    rank_R = np.where(said_R < UNKNOWN, said_R, counted_R)
    return TokenScores(
        request.key,
        own_R.astype(np.float32),
        rank_R.astype(np.int32),
        ids_RK.astype(np.int32),
        logprobs_RK.astype(np.float32),
    )


def _top(positions: list[Position], own_R: npt.NDArray, response_ids_R: npt.NDArray, top_k: int) -> tuple[Any, Any]:
    """(ids [R, K], log-probs [R, K]), likeliest first; between equal ones the server's own order."""
    if top_k == 0:
        return np.zeros((len(positions), 0), np.int64), np.zeros((len(positions), 0))
    counts_R = np.array([len(position.ids) for position in positions])
    is_miscounted_R = (counts_R < top_k) | (counts_R > top_k + 1)
    _refuse(is_miscounted_R, lambda t: f"{counts_R[t]} top log-probs, expected {top_k} or {top_k + 1} of different ids")
    owner_N = np.repeat(np.arange(len(positions)), counts_R)
    column_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    logprobs_RW = np.full((len(positions), top_k + 1), -np.inf)
    ids_RW, ranks_RW = np.full_like(logprobs_RW, -1, np.int64), np.zeros_like(logprobs_RW, np.int64)
    logprobs_RW[owner_N, column_N] = _logprobs(chain(*(position.logprobs for position in positions)), owner_N)
    ids_RW[owner_N, column_N] = _integers(chain(*(position.ids for position in positions)), owner_N, "id", 0)
    ranks_RW[owner_N, column_N] = _ranks(chain(*(position.ranks for position in positions)), owner_N)
    order_RK = np.lexsort((ids_RW, ranks_RW, -logprobs_RW), axis=-1)[:, :top_k]
    top_RK = np.take_along_axis(logprobs_RW, order_RK, 1)
    _check_top(ids_RW, logprobs_RW, top_RK, own_R, response_ids_R)
    return np.take_along_axis(ids_RW, order_RK, 1), top_RK


def _check_top(
    ids_RW: npt.NDArray, logprobs_RW: npt.NDArray, top_RK: npt.NDArray, own_R: npt.NDArray, response_ids_R: npt.NDArray
) -> None:
    """The list beside a token may be another position's. Then it disagrees about the token, or misses it."""
    top_k = top_RK.shape[1]
    is_repeated_R = (np.diff(np.sort(ids_RW, 1), axis=1) == 0).any(1)
    _refuse(is_repeated_R, lambda t: f"an id is twice among its top log-probs, expected {top_k} of different ids")
    is_own_RW = ids_RW == response_ids_R[:, None]
    is_listed_R = is_own_RW.any(1)
    listed_R = np.where(is_own_RW, logprobs_RW, -np.inf).max(1)
    _refuse(
        is_listed_R & (np.abs(np.where(is_listed_R, listed_R, own_R) - own_R) > SAME_NATS),
        lambda t: f"its log-prob is {own_R[t]:.6g}, but {listed_R[t]:.6g} among the top {top_k}",
    )
    _refuse(
        ~is_listed_R & (own_R > top_RK[:, -1] + SAME_NATS),
        lambda t: f"likelier ({own_R[t]:.6g}) than the last of the top {top_k} that lacks it",
    )
    _refuse(np.exp(top_RK).sum(1) > 1 + SAME_NATS, lambda t: f"the top {top_k} have more than all probability")


def _refuse(is_bad_R: npt.NDArray, what: Callable[[int], str]) -> None:
    if is_bad_R.any():
        t = int(is_bad_R.argmax())
        raise UnfitReplyError(f"response token {t + 1} of {len(is_bad_R)}: {what(t)}")


def _logprobs(values: Iterable[Any], owner_N: npt.NDArray) -> npt.NDArray:
    """Finite log-probs. -inf, or vLLM's -9999 for it, is none: a token of probability 0 would make the loss infinite."""
    found = list(values)
    # type() and not isinstance: true is an int. NaN fails every comparison; an int may be too large for a float.
    if {type(value) for value in found} <= {float, int} and all(IMPOSSIBLE < value <= 0 for value in found):
        return np.array(found, np.float64)
    bad = next(i for i, v in enumerate(found) if type(v) not in (float, int) or not IMPOSSIBLE < v <= 0)
    raise UnfitReplyError(
        f"response token {owner_N[bad] + 1} of {owner_N[-1] + 1}: its log-prob is {shown(found[bad])}; a log-prob is finite and at most 0"
    )


def _ranks(values: Iterable[Any], owner_N: npt.NDArray) -> npt.NDArray:
    return _integers((UNKNOWN if value is None else value for value in values), owner_N, "rank", 1)


def _integers(values: Iterable[Any], owner_N: npt.NDArray, name: str, least: int) -> npt.NDArray:
    found = list(values)
    if {type(value) for value in found} <= {int} and all(least <= value <= MAX_ID for value in found):
        return np.array(found, np.int64)
    bad = next(i for i, v in enumerate(found) if type(v) is not int or not least <= v <= MAX_ID)
    raise UnfitReplyError(
        f"response token {owner_N[bad] + 1} of {owner_N[-1] + 1}: {shown(found[bad])} is no {name} of a token"
    )


# SGLang


def _sglang_body(request: ScoreRequest, top_k: int, name: str) -> dict[str, Any]:
    return {
        "input_ids": all_ids(request),
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        # The entry at the start has no log-prob: from P - 1 on the response has all of its own, and no more is computed.
        "logprob_start_len": len(request.prompt_ids) - 1,
        "top_logprobs_num": top_k,
        "stream": False,
    }


def _sglang_positions(reply: dict[str, Any], request: ScoreRequest, top_k: int) -> Iterator[Position]:
    """meta_info.input_token_logprobs = [[null, last prompt id, text], [logprob, id, text or null], ...]."""
    meta = reply.get("meta_info")
    if not isinstance(meta, dict):
        raise UnfitReplyError(f"no meta_info; found {shown(sorted(reply))}")
    expected = len(request.response_ids) + 1
    tokens = _list_of(meta.get("input_token_logprobs"), expected, "input_token_logprobs")
    tops = _list_of(meta.get("input_top_logprobs"), expected, "input_top_logprobs") if top_k else [None] * expected
    if not _is_triple(tokens[0]) or tokens[0][:2] != [None, int(request.prompt_ids[-1])]:
        raise UnfitReplyError(
            f"input_token_logprobs begins with {shown(tokens[0])}, expected [null, {request.prompt_ids[-1]}, null]"
        )
    if tops[0]:
        raise UnfitReplyError(f"input_top_logprobs begins with {shown(tops[0])}, expected null")
    for t, token_id in enumerate(request.response_ids.tolist(), 1):
        place = f"response token {t} of {expected - 1}"
        top = tops[t] if top_k else []
        # Some documents speak of [logprob, rank, token]; then no id is where one has to be.
        for entry in (tokens[t], *(top if isinstance(top, list) else [top])):
            if not _is_triple(entry):
                raise UnfitReplyError(f"{place}: is {shown(entry)}, expected [logprob, id, text or null]")
        if tokens[t][1] != token_id:
            raise UnfitReplyError(f"{place}: has id {shown(tokens[t][1])}, sent was {token_id}")
        logprobs, ids, _ = zip(*top, strict=True) if top else ((), (), ())
        yield Position(tokens[t][0], None, list(ids), list(logprobs), [None] * len(ids))


def _is_triple(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str | None)


# vLLM


def _vllm_generate_body(request: ScoreRequest, top_k: int, name: str) -> dict[str, Any]:
    sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k, "detokenize": False}
    return {"model": name, "token_ids": all_ids(request), "sampling_params": sampling, "stream": False}


def _vllm_generate_positions(reply: dict[str, Any], request: ScoreRequest, top_k: int) -> Iterator[Position]:
    return _prompt_logprobs(reply.get("prompt_logprobs"), request, top_k)


def _vllm_completions_body(request: ScoreRequest, top_k: int, name: str) -> dict[str, Any]:
    # Without max_tokens it would generate to the end of the context; 0 is refused.
    settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k, "stream": False}
    return {"model": name, "prompt": all_ids(request), **settings}


def _vllm_completions_positions(reply: dict[str, Any], request: ScoreRequest, top_k: int) -> Iterator[Position]:
    choices = _list_of(reply.get("choices"), 1, "choices")
    if not isinstance(choices[0], dict):
        raise UnfitReplyError(f"choices holds {shown(choices[0])}")
    return _prompt_logprobs(choices[0].get("prompt_logprobs"), request, top_k)


def _prompt_logprobs(found: Any, request: ScoreRequest, top_k: int) -> Iterator[Position]:
    """[null or {}, {"id": {"logprob", "rank", ...}, ...}, ...], one entry for each token of prompt and response."""
    entries = _list_of(found, request.num_tokens, "prompt_logprobs")
    if entries[0] not in (None, {}):
        raise UnfitReplyError(f"prompt_logprobs begins with {shown(entries[0])}, expected null: nothing precedes it")
    length = len(request.response_ids)
    for t, token_id in enumerate(request.response_ids.tolist()):
        place = f"response token {t + 1} of {length}"
        # Not entries[-length:], which would be all of them for an empty response.
        entry = entries[len(entries) - length + t]
        if not isinstance(entry, dict) or str(token_id) not in entry:
            raise UnfitReplyError(f"{place}: its log-probs are {shown(entry)}; the id that was sent is {token_id}")
        if len(entry) > top_k + 1:
            raise UnfitReplyError(f"{place}: {len(entry)} log-probs, expected {top_k} or {top_k + 1}")
        try:
            ids = [int(name) for name in entry]
            logprobs = [value["logprob"] for value in entry.values()]
            ranks = [value.get("rank") for value in entry.values()]
        except (ValueError, TypeError, KeyError) as error:
            raise UnfitReplyError(f"{place}: is {shown(entry)}, expected ids with their logprob and rank") from error
        own = entry[str(token_id)]
        yield Position(own["logprob"], own.get("rank"), ids, logprobs, ranks)


# All


def all_ids(request: ScoreRequest) -> list[int]:
    """Prompt and response, as JSON takes them."""
    return [*request.prompt_ids.tolist(), *request.response_ids.tolist()]


def shown(value: Any) -> str:
    """Something that a server said, on one line and not too long."""
    text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."


def _list_of(value: Any, length: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnfitReplyError(f"{name} is {shown(value)}, expected a list of {length}")
    if len(value) != length:
        raise UnfitReplyError(f"{name} has {len(value)} entries, expected {length}")
    return value


DIALECTS = {
    "sglang": Dialect("/generate", _sglang_body, _sglang_positions),
    "vllm_generate": Dialect("/inference/v1/generate", _vllm_generate_body, _vllm_generate_positions),
    "vllm_completions": Dialect("/v1/completions", _vllm_completions_body, _vllm_completions_positions),
}
