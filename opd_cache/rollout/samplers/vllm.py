"""Sampling with vLLM's offline engine: one request a sample, with the sample's own seed.

The samples of a prompt stand side by side and share its keys and values, which costs the same as one request for all of
them; a seed is a request's, so that a sample does not depend on how many others its prompt has.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.errors import ConfigError, EngineOutputError, ModelError
from opd_cache.fingerprint import model_folder
from opd_cache.models import dtype_name
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.run_dir import CANARY
from opd_cache.store.plans import SamplingPlan
from opd_cache.store.publish import read_json
from opd_cache.vllm_engine import VERSION, VllmEngine, flat_logprobs_of, parameters

log = logging.getLogger(__name__)

# Old weights under a new policy's name differ by more after the first steps of any useful learning rate. 16 bits cannot
# tell; there every tensor is compared as well.
CANARY_TOLERANCE = {"float32": 1e-3}
CANARY_TOLERANCE_16_BITS = 0.5


class VllmSampler:
    """Samples with an engine that stays loaded; `load_policy` gives it new weights."""

    engine = VERSION

    def __init__(self, student: ModelConfig, options: RolloutConfig) -> None:
        self.dtype = dtype_name(student)
        self.options = options
        self._engine: VllmEngine | None = None

    def load_policy(self, config: ModelConfig) -> None:
        """Take the weights of a policy folder: in place where they prove to be there, else in a new engine.

        Raises ModelError where the engine gives other log-probs than the learner that wrote the policy.
        """
        folder = model_folder(config)
        if self._engine is not None and (self._engine.folder == folder or self._takes_in_place(folder)):
            return
        self.close()
        # Log-probs as sampled from, temperature and cuts included.
        self._engine = VllmEngine(
            config, self.options.vllm, "rollout.vllm", enable_prefix_caching=True, logprobs_mode="processed_logprobs"
        )
        if fault := self._canary_fault(folder):
            raise ModelError(f"{folder}: {fault}; nothing was sampled with it.")

    def _takes_in_place(self, folder: Path) -> bool:
        if not (folder / CANARY).exists():
            return False  # nothing to prove it by
        missing = self.loaded.load_weights(folder)
        fault = f"{missing[0]} did not arrive" if missing else self._canary_fault(folder)
        if fault:
            log.warning("rollout a new engine for %s: in place, %s", folder, fault)
        return fault is None

    def _canary_fault(self, folder: Path) -> str | None:
        """What is wrong with the engine's log-probs of the sequence that the learner wrote beside the policy."""
        if not (folder / CANARY).exists():
            return None
        canary = read_json(folder / CANARY)
        found = self.loaded.logprobs_of(canary["prompt_ids"], canary["response_ids"])
        difference = np.abs(found - np.array(canary["logprobs"], np.float32)).max()
        if difference <= CANARY_TOLERANCE.get(self.dtype, CANARY_TOLERANCE_16_BITS):
            return None
        return f"vLLM's log-probs of the canary differ by up to {difference:.3g} nats from the learner's"

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def loaded(self) -> VllmEngine:
        assert self._engine is not None, "load_policy comes first"
        return self._engine

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        """Responses in the order in which they end, each with its request's key."""
        by_key = {request.key: request for request in requests}
        for request in requests:
            self._check_context(len(request.prompt_ids), plan.max_new_tokens)
        outputs = self.loaded.stream(self._asked(request, plan) for request in requests)
        samples = (_sample(output, plan) for output in outputs)
        yield from self._with_raw(list(samples), by_key) if plan.cuts_distribution else samples

    def _with_raw(self, samples: list[Sample], by_key: dict[int, SampleRequest]) -> Iterator[Sample]:
        """The samples with their log-probs at temperature 1 without cuts: the engine gives one kind as it samples, and
        this one by scoring."""
        of_prompt = parameters(
            max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0, flat_logprobs=True, skip_reading_prefix_cache=True
        )  # fmt: skip
        sampled = {sample.key: sample for sample in samples}
        whole = (
            (key, [*by_key[key].prompt_ids.tolist(), *sample.response_ids.tolist()], of_prompt)
            for key, sample in sampled.items()
        )
        for output in self.loaded.stream(whole):
            sample = sampled[int(output.request_id)]
            yield replace(sample, raw_logprobs=flat_logprobs_of(output, sample.response_ids, 0)[0])

    def _check_context(self, prompt_tokens: int, max_new_tokens: int) -> None:
        limit = self.loaded.context_length
        if prompt_tokens + max_new_tokens > limit:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {max_new_tokens} exceed the student's context of {limit}. Lower it, or set prompts.max_prompt_tokens."
            )

    def _asked(self, request: SampleRequest, plan: SamplingPlan) -> tuple[int, list[int], Any]:
        return request.key, request.prompt_ids.tolist(), parameters(
            max_tokens=plan.max_new_tokens,
            temperature=plan.temperature,
            top_p=plan.top_p,
            top_k=plan.top_k or 0,
            seed=request.seed,
            stop_token_ids=plan.stop_token_ids,
            ignore_eos=True,  # the plan's ids end a response, and no other
            logprobs=0,
            flat_logprobs=True,
        )  # fmt: skip


def _sample(output: Any, plan: SamplingPlan) -> Sample:
    (completion,) = output.outputs
    ids = np.array(completion.token_ids, np.int32)
    flat = completion.logprobs
    if len(flat.logprobs) != len(ids) or not np.array_equal(np.asarray(flat.token_ids), ids):
        raise EngineOutputError(f"vLLM gave {len(flat.logprobs)} log-probs for {len(ids)} sampled tokens.")
    stopped = len(ids) > 0 and int(ids[-1]) in plan.stop_token_ids
    if (completion.finish_reason == "stop") != stopped:
        raise EngineOutputError(
            f"vLLM ended a response by {completion.finish_reason!r}, but its last token is {ids[-1:]}."
        )
    return Sample(
        int(output.request_id), ids, np.array(flat.logprobs, np.float32), None, "stop" if stopped else "length"
    )
