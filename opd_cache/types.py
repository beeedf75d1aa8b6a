"""The values that flow through the stages, one class a step: Prompt → Rollout → Score → (Rollout, Score)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as taken in: its token ids are what every stage sees."""

    prompt_index: int
    prompt_id: str
    prompt_ids: Int32Array
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. Per-token arrays have one entry a response token, all of the same length R."""

    rollout_id: str
    prompt_index: int
    sample_index: int
    prompt_ids: Int32Array  # [P]
    response_ids: Int32Array  # [R], R may be 0
    sampling_logprobs: Float32Array | None  # [R], at the distribution really sampled from; None where not known
    finish_reason: str
    policy_version: int
    raw_logprobs: Float32Array | None = None  # [R], at temperature 1 without cuts; None where they are the same
    reward: float | None = None  # of the task; None where there is none
    topk_ids: Int32Array | None = None  # [R, K], the student's likeliest first; None where they are not cached
    topk_logprobs: Float32Array | None = None  # [R, K], at temperature 1 without cuts
    loss_mask: BoolArray | None = None  # [R], which ids the student sampled; None where it sampled all

    @property
    def student_logprobs(self) -> Float32Array | None:
        """[R], of the student that sampled, at temperature 1 without cuts; None where not known."""
        return self.sampling_logprobs if self.raw_logprobs is None else self.raw_logprobs

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens that may carry a loss."""
        return len(self.response_ids) if self.loss_mask is None else int(np.count_nonzero(self.loss_mask))

    @property
    def ids_hash(self) -> int:
        """64-bit hash of the prompt's and the response's ids, which the score row must repeat."""
        return hash_ids(self.prompt_ids, self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class Score:
    """A teacher's view of one rollout. K is the number of top entries cached a token, 0 for none."""

    rollout_id: str
    ids_hash: int
    teacher_logprobs: Float32Array  # [R]
    teacher_rank: Int32Array  # [R], 1 = the teacher's likeliest token, 0 = the engine does not say
    topk_ids: Int32Array  # [R, K], likeliest first
    topk_logprobs: Float32Array  # [R, K], not renormalised
    error: str | None = None  # why this row could not be scored; its arrays are then empty
    is_dropped: bool = False  # left out of the loss by learn.drop_where; never stored


def hash_ids(prompt_ids: Int32Array, response_ids: Int32Array) -> int:
    """xxh3-64 of the prompt's length and all ids, as an unsigned integer."""
    digest = xxhash.xxh3_64(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").data)
    digest.update(np.ascontiguousarray(response_ids, dtype="<i4").data)
    return digest.intdigest()


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from named parts, such as (run seed, episode, prompt, sample). Never from rank or batch position."""
    text = "/".join(str(part) for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1
