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
from opd_cache.store.publish import read_plain_json
from opd_cache.types import Float32Array, Int32Array
from opd_cache.vllm_engine import (
    VERSION,
    VllmEngine,
    flat_columns,
    flat_form,
    parameters,
    prompt_logprobs_of,
    scoring_parameters,
)

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
        settings: dict[str, Any] = {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs"}
        if "max_logprobs" not in self.options.vllm.engine_args:
            settings["max_logprobs"] = max(20, self.options.student_top_k)
        self._engine = VllmEngine(config, self.options.vllm, "rollout.vllm", **settings)
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
        canary = read_plain_json(folder / CANARY)
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
            self._check_context(len(request.prompt_ids), plan)
        outputs = self.loaded.stream(self._asked(request, plan) for request in requests)
        samples = (_sample(output, plan) for output in outputs)
        yield from self._with_raw(list(samples), by_key, plan) if plan.cuts_distribution else samples

    def _with_raw(
        self, samples: list[Sample], by_key: dict[int, SampleRequest], plan: SamplingPlan
    ) -> Iterator[Sample]:
        """The samples with their log-probs and top k at temperature 1 without cuts: the engine gives one kind as it
        samples, and this one by scoring."""
        of_prompt = scoring_parameters(**flat_form(plan.student_top_k))
        sampled = {sample.key: sample for sample in samples}
        whole = (
            (key, [*by_key[key].prompt_ids.tolist(), *sample.response_ids.tolist()], of_prompt)
            for key, sample in sampled.items()
        )
        for output in self.loaded.stream(whole):
            sample = sampled[int(output.request_id)]
            raw, _, ids, logprobs = prompt_logprobs_of(output, sample.response_ids, plan.student_top_k)
            yield _with_topk(replace(sample, raw_logprobs=raw), plan, ids, logprobs)

    def _check_context(self, prompt_tokens: int, plan: SamplingPlan) -> None:
        limit = self.loaded.context_length
        # Scoring what was sampled generates one token behind it.
        if prompt_tokens + plan.max_new_tokens + plan.cuts_distribution > limit:
            more = ", and one more for raw_logprobs," if plan.cuts_distribution else ""
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {plan.max_new_tokens}{more} exceed the student's context of {limit}. Lower it, or set prompts.max_prompt_tokens."
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
            logprobs=_sampled_top_k(plan),
            flat_logprobs=True,
        )  # fmt: skip


def _sample(output: Any, plan: SamplingPlan) -> Sample:
    (completion,) = output.outputs
    ids = np.array(completion.token_ids, np.int32)
    logprobs, _, topk_ids, topk_logprobs = flat_columns(completion.logprobs, 0, ids, _sampled_top_k(plan))
    stopped = len(ids) > 0 and int(ids[-1]) in plan.stop_token_ids
    if (completion.finish_reason == "stop") != stopped:
        raise EngineOutputError(
            f"vLLM ended a response by {completion.finish_reason!r}, but its last token is {ids[-1:]}."
        )
    sample = Sample(int(output.request_id), ids, logprobs, None, "stop" if stopped else "length")
    return _with_topk(sample, plan, topk_ids, topk_logprobs)


def _sampled_top_k(plan: SamplingPlan) -> int:
    """The top k that comes along with sampling: that of the distribution sampled from."""
    return 0 if plan.cuts_distribution else plan.student_top_k


def _with_topk(sample: Sample, plan: SamplingPlan, ids: Int32Array, logprobs: Float32Array) -> Sample:
    return replace(sample, topk_ids=ids, topk_logprobs=logprobs) if ids.shape[1] == plan.student_top_k > 0 else sample
