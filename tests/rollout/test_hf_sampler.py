"""Sampling with transformers: one seed a sample, log-probs of the distribution really sampled from, honest endings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STOP_IDS
from transformers import AutoModelForCausalLM, GenerationConfig

from opd_cache.config import ModelConfig, RolloutConfig
from opd_cache.rollout.samplers.hf import HFSampler, choose, uniforms
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.store.plans import SamplingPlan

PLAN = SamplingPlan(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=10, stop_token_ids=STOP_IDS)


@pytest.fixture(scope="module")
def sampler(task: Path) -> HFSampler:
    return new_sampler(task, batch_size=8)


def new_sampler(task: Path, batch_size: int) -> HFSampler:
    student = ModelConfig(model=str(task / "student"), dtype="float32", device="cpu")
    sampler = HFSampler(student, RolloutConfig(batch_size=batch_size))
    sampler.load_policy(student)
    return sampler


def requests(count: int = 20) -> list[SampleRequest]:
    rng = np.random.default_rng(1)
    return [
        SampleRequest(key, rng.integers(3, 258, rng.integers(2, 9)).astype(np.int32), seed=1000 + key)
        for key in range(count)
    ]


def sample(sampler: HFSampler, asked: list[SampleRequest], plan: SamplingPlan = PLAN) -> dict[int, Sample]:
    return {found.key: found for found in sampler.sample(asked, plan)}


@torch.no_grad()
def plain_logits(task: Path, request: SampleRequest, response: np.ndarray) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(task / "student", dtype=torch.float32)
    ids = torch.tensor([[*request.prompt_ids.tolist(), *response.tolist()]])
    return model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()


def test_sampling_logprobs_equal_a_plain_log_softmax(sampler: HFSampler, task: Path) -> None:
    asked = requests()
    for key, found in sample(sampler, asked).items():
        logprobs = plain_logits(task, asked[key], found.response_ids).log_softmax(-1)
        own = logprobs.gather(-1, torch.from_numpy(found.response_ids).long()[:, None]).squeeze(-1)
        np.testing.assert_allclose(found.sampling_logprobs, own.numpy(), atol=1e-5, rtol=0)
        assert found.raw_logprobs is None


def test_temperature_and_cuts_keep_both_the_sampled_and_the_raw_logprobs(sampler: HFSampler, task: Path) -> None:
    asked = requests(6)
    plan = replace(PLAN, temperature=0.7, top_k=20, top_p=0.9)
    for key, found in sample(sampler, asked, plan).items():
        logits = plain_logits(task, asked[key], found.response_ids)
        own = torch.from_numpy(found.response_ids).long()[:, None]
        np.testing.assert_allclose(
            found.raw_logprobs, logits.log_softmax(-1).gather(-1, own).squeeze(-1), atol=1e-5, rtol=0
        )
        scaled = logits / 0.7
        cut = torch.where(scaled >= scaled.topk(20).values[:, -1:], scaled, -torch.inf)
        ordered, order = cut.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= 0.9
        cut = cut.scatter(-1, order, ordered.masked_fill(outside, -torch.inf))
        np.testing.assert_allclose(
            found.sampling_logprobs, cut.log_softmax(-1).gather(-1, own).squeeze(-1), atol=1e-5, rtol=0
        )


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(sampler: HFSampler, task: Path) -> None:
    asked = requests()
    together = sample(sampler, asked)
    alone = sample(new_sampler(task, batch_size=1), asked)
    for key, found in together.items():
        np.testing.assert_array_equal(found.response_ids, alone[key].response_ids)
        np.testing.assert_allclose(found.sampling_logprobs, alone[key].sampling_logprobs, atol=1e-5, rtol=0)


def test_other_seeds_give_other_samples(sampler: HFSampler) -> None:
    request = requests(1)[0]
    many = [replace(request, key=key, seed=key) for key in range(16)]
    responses = {tuple(found.response_ids.tolist()) for found in sample(sampler, many).values()}
    assert len(responses) == 16


def test_a_response_ends_with_the_sampled_stop_id_or_was_cut_without_one(sampler: HFSampler) -> None:
    reasons = set()
    for found in sample(sampler, requests(60)).values():
        stops = np.isin(found.response_ids, STOP_IDS)
        reasons.add(found.finish_reason)
        if found.finish_reason == "stop":
            assert stops[-1]
            assert stops.sum() == 1
        else:
            assert found.finish_reason == "length"
            assert len(found.response_ids) == PLAN.max_new_tokens
            assert not stops.any()
        assert len(found.sampling_logprobs) == len(found.response_ids)
    assert reasons == {"stop", "length"}


def test_the_models_own_generation_settings_do_not_act(sampler: HFSampler, task: Path) -> None:
    asked = requests(4)
    expected = sample(sampler, asked)
    other = new_sampler(task, batch_size=8)
    other.model.module.generation_config = GenerationConfig(
        repetition_penalty=3.0, temperature=0.1, top_k=1, do_sample=True
    )
    for key, found in sample(other, asked).items():
        np.testing.assert_array_equal(found.response_ids, expected[key].response_ids)


def test_greedy_takes_the_likeliest_token(sampler: HFSampler, task: Path) -> None:
    asked = requests(4)
    for key, found in sample(sampler, asked, replace(PLAN, temperature=0.0)).items():
        np.testing.assert_array_equal(
            plain_logits(task, asked[key], found.response_ids).argmax(-1).numpy(), found.response_ids
        )


def test_samples_follow_the_models_distribution(sampler: HFSampler, task: Path) -> None:
    request = requests(1)[0]
    many = [replace(request, key=key, seed=77 + key) for key in range(4000)]
    wide = new_sampler(task, batch_size=1000)
    first = np.bincount([s.response_ids[0] for s in wide.sample(many, replace(PLAN, max_new_tokens=1))], minlength=258)
    probs = plain_logits(task, request, np.array([0])).softmax(-1)[0].numpy()
    expected = 4000 * probs
    likely = expected >= 5
    chi_square = ((first[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    degrees = likely.sum()
    assert degrees > 5
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    one = uniforms([5, 9, 2**62], 50)
    assert np.array_equal(one[1:2], uniforms([9], 50))
    assert np.array_equal(one[:, :7], uniforms([5, 9, 2**62], 7))
    many = uniforms(range(2000), 200)
    assert many.min() > 0
    assert many.max() < 1
    assert abs(many.mean() - 0.5) < 0.002
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(many[:, :-1].ravel(), many[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("vocab_size", [7, 512, 1500])
def test_the_chosen_id_is_where_the_cumulative_distribution_passes_the_number(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits_BV = rng.normal(0, 4, (400, vocab_size)).astype(np.float32)
    logits_BV[rng.random(logits_BV.shape) < 0.5] = -np.inf  # as a top-p cut leaves them
    logits_BV[:, vocab_size // 2] = 0
    numbers_B1 = rng.random((400, 1))
    numbers_B1[:40], numbers_B1[40:80] = 0.5 / 2**32, 1 - 0.5 / 2**32
    logprobs_BV = torch.from_numpy(logits_BV).log_softmax(-1)
    chosen_B = choose(logprobs_BV, torch.from_numpy(numbers_B1)).squeeze(1).numpy()
    probs_BV = logprobs_BV.double().exp().numpy()
    probs_BV /= probs_BV.sum(-1, keepdims=True)
    end_B = np.cumsum(probs_BV, -1)[np.arange(400), chosen_B]
    own_B = probs_BV[np.arange(400), chosen_B]
    assert (own_B > 0).all()
    assert (end_B + 1e-6 > numbers_B1[:, 0]).all()
    assert (end_B - own_B - 1e-6 < numbers_B1[:, 0]).all()
