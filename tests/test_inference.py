"""Shorter ways to the same numbers: prompts computed once for their samples, and what a CPU does faster."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STOP_IDS, save_model, tiny_qwen2
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.inference import GROUPED, can_share_prompts, distinct_neighbours, use_cpu_attention, use_cpu_head
from opd_cache.models import load_model, load_weights_into, padded
from opd_cache.rollout.samplers import hf
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.store.plans import SamplingPlan

PLAN = SamplingPlan(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=12, stop_token_ids=STOP_IDS)


def windowed() -> PreTrainedModel:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=6, bos_token_id=2, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config)


def on_cpu(folder: Path) -> ModelConfig:
    return ModelConfig(model=str(folder), dtype="float32", device="cpu")


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, 258, length).astype(np.int32) for length in lengths]


def sampled(folder: Path, asked: list[SampleRequest]) -> dict[int, Sample]:
    sampler = HFSampler(on_cpu(folder), RolloutConfig(batch_size=16))
    sampler.load_policy(on_cpu(folder))
    return {found.key: found for found in sampler.sample(asked, PLAN)}


@pytest.fixture(params=[lambda: tiny_qwen2(seed=4), windowed], ids=["qwen2", "sliding window"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[], PreTrainedModel] = request.param
    return save_model(make(), tmp_path / "student")


def test_samples_that_share_a_prompt_are_those_that_compute_it_alone(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        SampleRequest(4 * group + sample, prompt, seed=100 * group + sample)
        for group, prompt in enumerate(prompts(5, 9, 9))
        for sample in range(4)
    ]
    calls: list[int] = []
    prefill = hf.prefill

    def counted(model: object, given: list[np.ndarray]) -> object:
        calls.append(distinct_neighbours(given)[-1] + 1)
        return prefill(model, given)  # type: ignore[arg-type]

    monkeypatch.setattr(hf, "prefill", counted)
    shared = sampled(student, asked)
    # A window's cache holds only the end of a prompt: each sample computes its own there.
    assert calls == ([3] if "qwen2" in str(load_model(on_cpu(student), "student").module.config.model_type) else [])
    plain = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for request in asked:
        (alone,) = sampled(student, [request]).values()
        found = shared[request.key]
        assert found.response_ids.tolist() == alone.response_ids.tolist()
        ids = torch.tensor([[*request.prompt_ids.tolist(), *found.response_ids.tolist()]])
        with torch.no_grad():
            logprobs = plain(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(-1, ids[0, len(request.prompt_ids) :, None]).squeeze(-1)
        np.testing.assert_allclose(found.sampling_logprobs, own.numpy(), atol=2e-5, rtol=0)


def test_prompts_of_one_token_and_of_one_sample_are_not_shared(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "prefill", lambda *_: pytest.fail("shared"))
    one, *others = prompts(1, 4, 6)
    assert len(sampled(student, [SampleRequest(key, one, seed=key) for key in range(3)])) == 3
    assert len(sampled(student, [SampleRequest(key, prompt, seed=key) for key, prompt in enumerate(others)])) == 2


def test_equal_prompts_count_as_one_where_they_stand_side_by_side() -> None:
    one, other, third = prompts(4, 4, 5)
    assert distinct_neighbours([one, one.copy(), other, third, third, one]) == [0, 0, 1, 2, 2, 3]


def test_grouped_attention_gives_the_same_bits_in_a_padded_batch(student: Path) -> None:
    plain, grouped = load_model(on_cpu(student), "student"), load_model(on_cpu(student), "student")
    use_cpu_attention(grouped)
    assert grouped.module.config._attn_implementation == GROUPED
    for side in ("left", "right"):
        ids, mask = padded(prompts(3, 12, 7), side, plain.device)
        with torch.inference_mode():
            assert torch.equal(grouped.hidden(ids, mask), plain.hidden(ids, mask))


def test_the_head_of_few_rows_follows_the_weights_and_gives_the_same_logits(tmp_path: Path) -> None:
    folders = [save_model(tiny_qwen2(seed=seed), tmp_path / f"{seed}") for seed in (1, 2)]
    model = load_model(on_cpu(folders[0]), "student")
    assert can_share_prompts(model)
    use_cpu_head(model)
    assert load_weights_into(model, folders[1])
    plain = load_model(on_cpu(folders[1]), "student")
    for count in (1, 5, 40):
        ids, mask = padded(prompts(*[4] * count), "left", plain.device)
        with torch.inference_mode():
            found, expected = (one.module(ids, attention_mask=mask).logits for one in (model, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
