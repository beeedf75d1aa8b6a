"""What a scorer is asked for and what it gives: the seam between the stage and its backends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import StoreError
from opd_cache.types import Float32Array, Int32Array

UNKNOWN_RANK = 0  # where an engine does not say
# Of float32 logits that the hf scorer holds at once: a product of few rows by a head of a large vocabulary runs at half
# speed.
LOGITS_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One response to score, after the prompt that the teacher is to see."""

    key: int
    prompt_ids: Int32Array  # [P], P > 0
    response_ids: Int32Array  # [R], R may be 0
    group: int  # requests of one group are neighbours and have the same prompt
    support_ids: Int32Array | None = None  # [R, K], to be scored as the top k; None: the teacher's likeliest

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A teacher's view of one response: R entries, or none and the reason why it could not be scored."""

    key: int
    logprobs: Float32Array  # [R], of each response id given all before it, nats
    rank: Int32Array  # [R], 1 = the teacher's likeliest token, or UNKNOWN_RANK
    topk_ids: Int32Array  # [R, K], likeliest first, or the request's support_ids
    topk_logprobs: Float32Array  # [R, K], not renormalised
    error: str | None = None


class UnfitScoresError(StoreError):
    """A backend answered requests with what no score can be. It knows only their keys; the stage names the rollouts."""

    def __init__(self, faults: dict[int, str]) -> None:
        super().__init__(
            f"{len(faults)} requests got no scores; key {next(iter(faults))}: {next(iter(faults.values()))}"
        )
        self.faults = faults  # what was wrong, by request key


class Scorer(Protocol):
    """A backend of the score stage. The constructor does not load the model; the first use does."""

    engine: str  # name and version, for the logs
    dtype: str  # the teacher's compute dtype, part of what a score is
    window: int  # requests handed over at once: bounds memory, and within it they may be reordered

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None: ...

    def fingerprint(self) -> str:
        """Digest that tells the teacher's weights from others', without loading them; part of what a score is.

        Raises TryAgainError when only a server can tell and none answers at once.
        """

    def load(self) -> None:
        """Load the teacher, unless it is. Waits for a server that is starting; raises TryAgainError in the end."""

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        """One TokenScores a request, in any order, with the request's key.

        Raises UnfitScoresError when the backend's answers to some are no scores.
        """

    def close(self) -> None:
        """Give the teacher's memory back; load brings it again."""


def beyond_vocabulary(request: ScoreRequest, vocab_size: int) -> str | None:
    """Why a teacher with so many embeddings cannot score the request."""
    asked = [request.prompt_ids, request.response_ids, *([] if request.support_ids is None else [request.support_ids])]
    largest = max(ids.max(initial=0) for ids in asked)
    return f"token id {largest}, the teacher has {vocab_size} embeddings" if largest >= vocab_size else None


def no_scores(key: int, top_k: int, error: str | None = None) -> TokenScores:
    """The scores of a response without tokens, or of one that cannot be scored."""
    ids, logprobs = np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32)
    return TokenScores(key, np.zeros(0, np.float32), np.zeros(0, np.int32), ids, logprobs, error)
