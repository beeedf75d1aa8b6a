"""Task rewards of tests' own: `rollout.reward=own_rewards:even_share`. Random models are seldom right, and these vary."""

import os

import numpy as np

from opd_cache.errors import TryAgainError
from opd_cache.grade import Response


def even_share(response: Response) -> float | None:
    """Share of even token ids; None for a response without any."""
    ids = response.response_ids
    return float(np.mean(ids % 2 == 0)) if (ids % 2 == 0).any() else None


def seen(response: Response) -> float:
    """Tells in one number what the function was given: the digits of the prompt's id, +1000 with an answer, +0.5 cut."""
    has_answer, is_cut = response.answer is not None, response.finish_reason == "length"
    return int(response.prompt_id.removeprefix("p")) + 1000 * has_answer + 0.5 * is_cut


def nothing(response: Response) -> float:
    return float("nan")


def infinite(response: Response) -> float:
    return float("-inf")


def beyond_float32(response: Response) -> float:
    return 1e39


def beyond_float64(response: Response) -> int:
    return 10**400


def words(response: Response) -> str:
    return "very\ngood"


def told_to_fail(response: Response) -> float | str:
    """1 for each response; but of the prompts that the environment names under a kind of failure, that."""

    def is_told(kind: str) -> bool:
        return response.prompt_id in os.environ.get(kind, "").split(",")

    if is_told("RAISES"):
        raise ValueError(f"boom at\n{response.prompt_id}")
    if is_told("TRIES_AGAIN"):
        raise TryAgainError(f"no answer for {response.prompt_id}")
    return "much" if is_told("SAYS_MUCH") else 1.0


NO_FUNCTION = 0.5
