"""What a shard of scores must stand up to before it is published: plausible numbers, and the same numbers again."""

from collections.abc import Mapping

import numpy as np

from opd_cache.errors import EngineOutputError, MismatchError
from opd_cache.score.scores import TokenScores
from opd_cache.types import Float32Array, Score

# A mean over fewer tokens says little.
MIN_TOKENS = 200
# On its own samples a student is at least as sure as any teacher, in the mean: KL(student || teacher) ≥ 0.
LEAST_GAP = -0.5
# (largest, mean) difference of a row's log-probs from one scoring to the next; engines in 16 bits round by batch shape.
REPEATS_TO = {"float32": (1e-3, 1e-4)}
REPEATS_TO_16_BITS = (0.5, 0.1)


def check_gap(figures: Mapping[str, float], max_gap: float | None, where: str) -> None:
    """Look at the mean student − teacher log-prob of a shard's tokens, whose score_figures these are.

    Raises MismatchError where the scores cannot be this teacher's of these tokens.
    """
    tokens = figures["compared_tokens"]
    if max_gap is None or tokens < MIN_TOKENS:
        return
    gap = -figures["advantage_sum"] / tokens
    if gap > max_gap:
        raise MismatchError(
            f"{where}: the teacher finds the student's tokens {gap:.1f} nats a token less likely than the student does (score.max_gap = {max_gap}). The likely causes: another tokenizer, another chat template than the teacher was trained with, or log-probs shifted by one position. Nothing was published; raise score.max_gap if the two really differ so much."
        )
    if gap < LEAST_GAP:
        raise MismatchError(
            f"{where}: the teacher finds the student's own samples {-gap:.1f} nats a token more likely than the student that sampled them. The stored sampling log-probs are not the sampler's, or the scores are of other tokens. Nothing was published; set score.max_gap=null to score all the same."
        )


def check_repeats(found: Score, again: TokenScores, dtype: str, where: str) -> None:
    """Compare a row with its scores when it is scored again, alone. Raises EngineOutputError where they differ by more
    than a dtype explains."""
    if fault := repeat_fault(found.teacher_logprobs, again.logprobs, dtype):
        raise EngineOutputError(
            f"{where}: {found.rollout_id} scored again alone {fault}. Nothing was published; for an engine, try share_prompts=never."
        )


def repeat_fault(stored: Float32Array, again: Float32Array, dtype: str) -> str | None:
    """How the log-probs of a row differ from those of another scoring, where a dtype does not explain it."""
    if len(stored) != len(again):
        return f"gives {len(again)} log-probs, stored are {len(stored)}"
    largest, mean = REPEATS_TO.get(dtype, REPEATS_TO_16_BITS)
    differences = repeat_differences(stored, again)
    if not differences.size or (differences.max() <= largest and differences.mean() <= mean):
        return None
    return f"differs by up to {differences.max():.3g} nats (mean {differences.mean():.3g}), more than {dtype} explains"


def repeat_differences(stored: Float32Array, again: Float32Array) -> Float32Array:
    """Token by token, nats; infinite log-probs count as equal, or as infinitely different."""
    finite = np.isfinite(stored) & np.isfinite(again)
    differences = np.subtract(stored, again, where=finite, out=np.zeros(stored.shape, np.float32))
    differences[~finite & (stored != again)] = np.inf
    return np.abs(differences)
