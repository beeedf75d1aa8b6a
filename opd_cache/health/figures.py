"""What a stage's health is told by: sums over the rows of a shard, taken while its rows are in memory.

They go into the shard's footer and into the seal, so that nothing is read a second time. What they are held against is
in checks.py.
"""

from collections.abc import Sequence

import numpy as np

from opd_cache.types import BoolArray, Int32Array, Rollout, Score

# A response ends in a loop when it was cut and its last so many tokens stand in it so many times or more. One that ends
# with an EOS has found out of it by itself; to look at those, too, costs more than all other figures together.
LOOP_TOKENS = 16
LOOP_TIMES = 3
UNLIKELY_LOGPROB = float(np.log(1e-6))
# A log-prob of −inf is legitimate for one token, and would hide all others in a mean.
LEAST_LOGPROB = -100.0


def rollout_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Responses by how they ended: with an EOS, with nothing before it, cut in a loop."""
    cut = [rollout for rollout in rollouts if rollout.finish_reason != "stop"]
    empty = sum(len(rollout.response_ids) <= (rollout.finish_reason == "stop") for rollout in rollouts)
    return {
        "responses": len(rollouts),
        "eos_responses": len(rollouts) - len(cut),
        "empty_responses": empty,
        "looping_responses": sum(ends_in_a_loop(rollout.response_ids) for rollout in cut),
    }


def ends_in_a_loop(response_ids: Int32Array) -> bool:
    """Whether the last LOOP_TOKENS of a response stand in it LOOP_TIMES or more, overlaps included."""
    if len(response_ids) < LOOP_TOKENS + LOOP_TIMES - 1:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(response_ids, LOOP_TOKENS)
    candidates = windows[windows[:, -1] == response_ids[-1]]
    return int((candidates == windows[-1]).all(axis=1).sum()) >= LOOP_TIMES


def score_figures(rollouts: Sequence[Rollout], scores: Sequence[Score], first_token: int = 0) -> dict[str, float]:
    """Scored tokens, those that the teacher finds all but impossible, and the sum of teacher − student log-prob.

    first_token: of the responses that the scores begin at. A row without scores adds nothing, nor does a token that the
    student did not sample; where its log-probs are not known, none is compared.
    """
    if not rollouts:
        return {}
    counts = [len(score.teacher_logprobs) for score in scores]
    places = [slice(first_token, first_token + count) for count in counts]
    teacher = np.concatenate([score.teacher_logprobs for score in scores])
    is_sampled = _sampled(rollouts, places, counts)
    if is_sampled is not None:
        teacher = teacher[is_sampled]
    unlikely = int(np.count_nonzero(teacher < np.float32(UNLIKELY_LOGPROB)))
    found = {"scored_tokens": len(teacher), "unlikely_tokens": unlikely, "compared_tokens": 0, "advantage_sum": 0.0}
    known = [
        values[place]
        for values, place in zip((rollout.student_logprobs for rollout in rollouts), places, strict=True)
        if values is not None
    ]
    if len(known) < len(rollouts):
        return found
    student = np.concatenate(known)
    if is_sampled is not None:
        student = student[is_sampled]
    for logprobs in (teacher, student):
        np.maximum(logprobs, np.float32(LEAST_LOGPROB), out=logprobs)
    advantage = float(np.subtract(teacher, student, out=teacher).sum(dtype=np.float64))
    return {**found, "compared_tokens": len(student), "advantage_sum": advantage}


def _sampled(rollouts: Sequence[Rollout], places: Sequence[slice], counts: Sequence[int]) -> BoolArray | None:
    """Of the rows' scored tokens, one behind the other, which the student sampled; None where it sampled all."""
    if all(rollout.loss_mask is None for rollout in rollouts):
        return None
    masks = [
        np.ones(count, np.bool_) if rollout.loss_mask is None else rollout.loss_mask[place]
        for rollout, place, count in zip(rollouts, places, counts, strict=True)
    ]
    return np.concatenate(masks)
