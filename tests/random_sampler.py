"""A sampler without a model, for tests that need many rollouts: `rollout.sampler=random_sampler:RandomSampler`."""

from collections.abc import Iterator, Sequence

import numpy as np

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.store.plans import SamplingPlan


class RandomSampler:
    """Uniform tokens over the tiny vocabulary; every response is cut at max_new_tokens."""

    engine = "random 1"

    dtype = "float32"

    def __init__(self, student: ModelConfig, options: RolloutConfig) -> None:
        self.options = options

    def load_policy(self, config: ModelConfig) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to give back."""

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        for request in requests:
            ids = np.random.default_rng(request.seed).integers(90, 250, plan.max_new_tokens).astype(np.int32)
            logprobs = np.full(len(ids), -np.log(160), np.float32)
            yield Sample(request.key, ids, logprobs, None, "length")
