"""Sampling with transformers' generate, one seed a sample.

A sample's random numbers are a pure function of its seed and the position, so it does not matter which rows share its
batch. They enter generate through a logits processor that draws the token itself (by inverting the cumulative
distribution at one uniform number) and leaves generate a one-hot choice.
"""

# B sequences side by side, T new tokens, V vocabulary; the vocabulary in K blocks of C ids

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import __version__ as transformers_version

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.errors import ConfigError, DivergedError
from opd_cache.fingerprint import model_folder
from opd_cache.inference import can_share_prompts, distinct_neighbours, prefill, use_cpu_attention, use_cpu_head
from opd_cache.models import (
    LanguageModel,
    dtype_name,
    explained_memory_errors,
    load_model,
    load_weights_into,
    padded,
)
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.store.plans import SamplingPlan

CHOICE_BLOCK = 512


def uniforms(seeds: Sequence[int], num_positions: int) -> np.ndarray:
    """[B, T] numbers in (0, 1): entry (b, t) depends on seeds[b] and t alone. splitmix64 of seed + t·golden ratio."""
    with np.errstate(over="ignore"):
        positions = np.arange(1, num_positions + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.array(seeds, dtype=np.uint64)[:, None] + positions[None, :]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    # 32 bits and a half step keep every value clear of 0 and 1 after the product with a float64 sum.
    return ((z >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32


def choose(logprobs_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """[B, 1]: the id at which each row's cumulative distribution exceeds its uniform number (float64); never one of
    probability 0.

    First the block of ids, then the id within it: a cumulative sum over a whole vocabulary in float64 takes as long as a
    fifth of a small model's step. NaN probabilities give some id; they are refused when the batch is done.
    """
    probs_BV = torch.nn.functional.pad(logprobs_BV.exp(), (0, -logprobs_BV.shape[-1] % CHOICE_BLOCK))
    blocks_BKC = probs_BV.view(len(probs_BV), -1, CHOICE_BLOCK)
    ends_BK = blocks_BKC.sum(-1).to(torch.float64).cumsum(-1)
    threshold_B1 = uniforms_B1 * ends_BK[:, -1:]
    block_B1 = torch.searchsorted(ends_BK, threshold_B1, right=True).clamp(max=ends_BK.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, ends_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    block_BC = blocks_BKC.gather(1, block_B1[..., None].expand(-1, 1, CHOICE_BLOCK)).squeeze(1)
    within_BC = block_BC.to(torch.float64).cumsum(-1)
    # The block's sum was rounded: what is left of the threshold must stay below the sum in float64.
    rest_B1 = torch.minimum(threshold_B1 - before_B1, within_BC[:, -1:] * (1 - 2.0**-33))
    place_B1 = torch.searchsorted(within_BC, rest_B1, right=True)
    return (block_B1 * CHOICE_BLOCK + place_B1).clamp(max=logprobs_BV.shape[-1] - 1)


class _SeededChoice(LogitsProcessor):
    """Chooses each row's next token and records its log-prob; generate then only takes the argmax."""

    def __init__(self, plan: SamplingPlan, seeds: Sequence[int], device: torch.device) -> None:
        self.uniforms_BT = torch.from_numpy(uniforms(seeds, plan.max_new_tokens)).to(device, torch.float64)
        self.plan = plan
        self.warpers = LogitsProcessorList()
        if plan.top_k is not None:
            self.warpers.append(TopKLogitsWarper(plan.top_k))
        if plan.top_p < 1:
            self.warpers.append(TopPLogitsWarper(plan.top_p))
        self.sampled: list[Tensor] = []  # [B] each
        self.raw: list[Tensor] = []
        self.topk: list[tuple[Tensor, Tensor]] = []  # (log-probs, ids), [B, K] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        raw_BV = logits_BV.log_softmax(-1)
        if self.plan.temperature == 0:
            sampled_BV, chosen_B1 = raw_BV, raw_BV.argmax(-1, keepdim=True)
        else:
            sampled_BV = raw_BV
            if self.plan.cuts_distribution:
                sampled_BV = self.warpers(input_ids, logits_BV / self.plan.temperature).log_softmax(-1)
            chosen_B1 = choose(sampled_BV, self.uniforms_BT[:, len(self.sampled), None])
        self.sampled.append(sampled_BV.gather(-1, chosen_B1).squeeze(-1))
        if self.plan.cuts_distribution:
            self.raw.append(raw_BV.gather(-1, chosen_B1).squeeze(-1))
        if self.plan.student_top_k:
            values_BK, ids_BK = raw_BV.topk(self.plan.student_top_k, dim=-1)
            self.topk.append((values_BK, ids_BK.to(torch.int32)))
        return torch.full_like(logits_BV, float("-inf")).scatter_(-1, chosen_B1, 0.0)


class HFSampler:
    """Samples with a transformers model that stays loaded; `load_policy` gives it new weights."""

    engine = f"transformers {transformers_version}"

    def __init__(self, student: ModelConfig, options: RolloutConfig) -> None:
        self.dtype = dtype_name(student)
        self.batch_size = options.batch_size
        self.model: LanguageModel | None = None

    def load_policy(self, config: ModelConfig) -> None:
        """Take the weights of a policy folder, into the warm model where they fit."""
        if self.model is not None and load_weights_into(self.model, model_folder(config)):
            return
        self.model = None  # the old weights must not stay while the new ones come
        self.model = load_model(config, "student")
        use_cpu_attention(self.model)
        use_cpu_head(self.model)

    def close(self) -> None:
        self.model = None

    def sample(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        """Responses in any order, each with its request's key. Batches are formed by prompt length."""
        by_length = sorted(requests, key=lambda request: (len(request.prompt_ids), request.key))
        for start in range(0, len(by_length), self.batch_size):
            with explained_memory_errors("rollout.batch_size", self.batch_size):
                samples = list(self._sample_batch(by_length[start : start + self.batch_size], plan))
            yield from samples

    def _check_context(self, prompt_tokens: int, max_new_tokens: int) -> None:
        assert self.model is not None
        limit = self.model.context_length
        if limit is not None and prompt_tokens + max_new_tokens > limit:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens = {max_new_tokens} exceed the student's context of {limit}. Lower it, or set prompts.max_prompt_tokens."
            )

    def _shared_prompts(self, prompts: Sequence[np.ndarray]) -> dict[str, Any]:
        """What generate goes on from where samples share their prompts: keys and values of all but the last token, each
        prompt computed once."""
        assert self.model is not None
        is_shared = distinct_neighbours(prompts)[-1] + 1 < len(prompts) and min(map(len, prompts)) > 1
        if not is_shared or not can_share_prompts(self.model):
            return {}
        return {"past_key_values": prefill(self.model, [ids[:-1] for ids in prompts])}

    @torch.inference_mode()
    def _sample_batch(self, requests: Sequence[SampleRequest], plan: SamplingPlan) -> Iterator[Sample]:
        assert self.model is not None, "load_policy comes first"
        module: Any = self.model.module
        input_ids_BP, attention_mask_BP = padded([r.prompt_ids for r in requests], "left", self.model.device)
        self._check_context(input_ids_BP.shape[1], plan.max_new_tokens)
        if plan.student_top_k > self.model.vocab_size:
            raise ConfigError(
                f"rollout.student_top_k = {plan.student_top_k}, but the student has only {self.model.vocab_size} tokens."
            )
        choice = _SeededChoice(plan, [r.seed for r in requests], self.model.device)
        options = self._shared_prompts([r.prompt_ids for r in requests])
        # A model's own generation_config may hold a repetition penalty or a temperature: none of it may act here.
        module.generation_config = GenerationConfig()
        output = module.generate(
            input_ids=input_ids_BP,
            attention_mask=attention_mask_BP,
            logits_processor=LogitsProcessorList([choice]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=plan.max_new_tokens,
                eos_token_id=plan.stop_token_ids,
                pad_token_id=plan.stop_token_ids[0],
            ),
            **options,
        )
        new_ids_BT = output[:, input_ids_BP.shape[1] :].to("cpu", torch.int32).numpy()
        sampled_BT = torch.stack(choice.sampled, 1).cpu().numpy()
        if np.isnan(sampled_BT).any():
            raise DivergedError(f"{self.model.source}: gives NaN log-probs in {self.dtype}; nothing was published.")
        raw_BT = torch.stack(choice.raw, 1).cpu().numpy() if choice.raw else None
        topk = [torch.stack(column, 1).cpu().numpy() for column in zip(*choice.topk, strict=True)]  # [B, T, K]
        is_stop_BT = np.isin(new_ids_BT, plan.stop_token_ids)
        for row, request in enumerate(requests):
            # Cut by the first stop id that was sampled, never by a padding id: pad may equal EOS.
            stopped = bool(is_stop_BT[row].any())
            length = int(is_stop_BT[row].argmax()) + 1 if stopped else new_ids_BT.shape[1]
            yield Sample(
                key=request.key,
                response_ids=new_ids_BT[row, :length].copy(),
                sampling_logprobs=sampled_BT[row, :length].copy(),
                raw_logprobs=None if raw_BT is None else raw_BT[row, :length].copy(),
                finish_reason="stop" if stopped else "length",
                topk_ids=topk[1][row, :length].copy() if topk else None,
                topk_logprobs=topk[0][row, :length].copy() if topk else None,
            )
