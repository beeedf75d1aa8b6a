"""What a sampler is asked for and what it gives: the seam between the stage and its backends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.store.plans import SamplingPlan
from opd_cache.types import Float32Array, Int32Array


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to sample. The seed is all its randomness."""

    key: int
    prompt_ids: Int32Array  # [P]
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response; the arrays have R entries."""

    key: int
    response_ids: Int32Array
    sampling_logprobs: Float32Array
    raw_logprobs: Float32Array | None
    finish_reason: str
    topk_ids: Int32Array | None = None  # [R, K], the student's likeliest first, where the plan asks for them
    topk_logprobs: Float32Array | None = None  # [R, K], at temperature 1 without cuts


class Sampler(Protocol):
    """A backend of the rollout stage."""

    engine: str  # name and version, for the logs
    dtype: str  # the student's compute dtype, part of what a sample is

    def __init__(self, student: ModelConfig, options: RolloutConfig) -> None: ...

    def load_policy(self, config: ModelConfig) -> None:
        """Use this policy from now on."""

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        """One Sample a request, in any order, with the request's key."""

    def close(self) -> None:
        """Give its memory back."""
