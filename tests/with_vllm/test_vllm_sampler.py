"""Sampling with real vLLM: seeds, stop ids, log-probs, and the weights of a new policy."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from helpers import STOP_IDS, save_model, tiny_qwen2

from opd_cache.config import ModelConfig, RolloutConfig, ScoreConfig, TeacherConfig, VllmOptions
from opd_cache.errors import ConfigError, ModelError
from opd_cache.rollout.samplers.vllm import VllmSampler
from opd_cache.rollout.samples import Sample, SampleRequest
from opd_cache.run_dir import CANARY
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest
from opd_cache.store.plans import SamplingPlan

STOP = STOP_IDS[:12]
PLAN = SamplingPlan(1.0, 1.0, None, 24, STOP)


def requests(prompts: int = 10, samples: int = 3) -> list[SampleRequest]:
    rng = np.random.default_rng(1)
    rows: list[SampleRequest] = []
    for _ in range(prompts):
        ids = rng.integers(90, 250, rng.integers(1, 70)).astype(np.int32)
        rows += [SampleRequest(len(rows) + i, ids, int(rng.integers(0, 2**62))) for i in range(samples)]
    return rows


def by_key(sampler: VllmSampler, rows: list[SampleRequest], plan: SamplingPlan = PLAN) -> dict[int, Sample]:
    found = {sample.key: sample for sample in sampler.sample(rows, plan)}
    assert sorted(found) == sorted(row.key for row in rows)
    return found


def student(folder: Path) -> ModelConfig:
    return ModelConfig(model=str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sampler(teacher_folder: Path) -> Iterator[VllmSampler]:
    sampler = VllmSampler(student(teacher_folder), RolloutConfig(vllm=VllmOptions(**SMALL), student_top_k=25))
    sampler.load_policy(student(teacher_folder))
    yield sampler
    sampler.close()


def logprobs_of(folder: Path, rows: list[SampleRequest], found: dict[int, Sample]) -> dict[int, np.ndarray]:
    """Of each sample under a model, by transformers."""
    scorer = HFScorer(TeacherConfig(model=str(folder), dtype="float32", device="cpu"), ScoreConfig())
    asked = [ScoreRequest(row.key, row.prompt_ids, found[row.key].response_ids, row.key) for row in rows]
    return {scores.key: scores.logprobs for scores in scorer.score(asked, 0)}


def test_sampled_logprobs_are_the_students(sampler: VllmSampler, teacher_folder: Path) -> None:
    rows = requests()
    found = by_key(sampler, rows)
    for key, expected in logprobs_of(teacher_folder, rows, found).items():
        np.testing.assert_allclose(found[key].sampling_logprobs, expected, atol=2e-5, rtol=0)
        assert found[key].raw_logprobs is None


def test_a_response_ends_with_the_stop_id_that_was_sampled_or_is_cut(sampler: VllmSampler) -> None:
    found = by_key(sampler, requests())
    assert {sample.finish_reason for sample in found.values()} == {"stop", "length"}
    for sample in found.values():
        ended = np.isin(sample.response_ids, STOP)
        assert not ended[:-1].any()
        assert ended[-1] == (sample.finish_reason == "stop")
        assert len(sample.response_ids) == 24 or ended[-1]


def test_a_sample_depends_on_its_seed_alone(sampler: VllmSampler) -> None:
    rows = requests()
    together = by_key(sampler, rows)
    for row in rows[:4]:
        (alone,) = by_key(sampler, [row]).values()
        np.testing.assert_array_equal(alone.response_ids, together[row.key].response_ids)
    assert len({together[row.key].response_ids.tobytes() for row in rows[:3]}) > 1


def test_cut_distributions_come_with_both_logprobs(sampler: VllmSampler, teacher_folder: Path) -> None:
    plan = SamplingPlan(0.7, 1.0, 5, 24, STOP)
    rows = requests(prompts=4)
    found = by_key(sampler, rows, plan)
    for key, expected in logprobs_of(teacher_folder, rows, found).items():
        sample = found[key]
        assert sample.raw_logprobs is not None
        np.testing.assert_allclose(sample.raw_logprobs, expected, atol=2e-5, rtol=0)
        assert (sample.sampling_logprobs > sample.raw_logprobs - 1e-6).mean() > 0.5
        assert not np.allclose(sample.sampling_logprobs, sample.raw_logprobs, atol=1e-2)


@pytest.mark.parametrize("cuts", [{}, {"temperature": 0.7, "top_k": 5}])
def test_the_students_likeliest_tokens_come_at_temperature_1_without_cuts(
    sampler: VllmSampler, teacher_folder: Path, cuts: dict
) -> None:
    rows = requests(prompts=4)
    found = by_key(sampler, rows, replace(PLAN, student_top_k=25, **cuts))
    scorer = HFScorer(TeacherConfig(model=str(teacher_folder), dtype="float32", device="cpu"), ScoreConfig())
    asked = [ScoreRequest(row.key, row.prompt_ids, found[row.key].response_ids, row.key) for row in rows]
    for scores in scorer.score(asked, 25):
        sample = found[scores.key]
        np.testing.assert_allclose(sample.topk_logprobs, scores.topk_logprobs, atol=2e-5, rtol=0)
        assert (sample.topk_ids == scores.topk_ids).mean() > 0.99  # near ties may swap
        assert (sample.raw_logprobs is None) == (cuts == {})


def test_greedy_takes_the_likeliest_token(sampler: VllmSampler, teacher_folder: Path) -> None:
    rows = requests(prompts=3, samples=1)
    found = by_key(sampler, rows, SamplingPlan(0.0, 1.0, None, 10, STOP))
    scorer = HFScorer(TeacherConfig(model=str(teacher_folder), dtype="float32", device="cpu"), ScoreConfig())
    asked = [ScoreRequest(row.key, row.prompt_ids, found[row.key].response_ids, row.key) for row in rows]
    assert all((scores.rank == 1).all() for scores in scorer.score(asked, 0))


def test_prompts_that_leave_no_room_are_refused(sampler: VllmSampler) -> None:
    just = SampleRequest(0, np.full(sampler.loaded.context_length - 24, 99, np.int32), 1)
    assert by_key(sampler, [just])
    with pytest.raises(ConfigError, match=r"max_new_tokens = 24, and one more for raw_logprobs, exceed"):
        list(sampler.sample([just], replace(PLAN, temperature=0.7)))
    row = SampleRequest(0, np.full(240, 99, np.int32), 1)
    with pytest.raises(
        ConfigError, match=r"a prompt of 240 tokens and rollout.max_new_tokens = 24 exceed the student's"
    ):
        list(sampler.sample([row], PLAN))


def write_canary(folder: Path, row: SampleRequest, response: np.ndarray) -> None:
    """As the learner does."""
    scorer = HFScorer(TeacherConfig(model=str(folder), dtype="float32", device="cpu"), ScoreConfig())
    (scores,) = scorer.score([ScoreRequest(0, row.prompt_ids, response, 0)], 0)
    content = {
        "prompt_ids": row.prompt_ids.tolist(),
        "response_ids": response.tolist(),
        "logprobs": scores.logprobs.tolist(),
    }
    (folder / "trainer").mkdir()
    (folder / CANARY).write_text(json.dumps(content))


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_policys_weights_are_taken_in_place_and_are_the_ones_that_sample(tied: bool, tmp_path: Path) -> None:
    """Body and LM head, and no keys and values of the old weights."""
    shape = {"hidden_size": 128, "tie_word_embeddings": tied, "max_position_embeddings": 256}
    folders = [save_model(tiny_qwen2(seed=seed, **shape), tmp_path / str(seed)) for seed in (11, 12)]
    rows = requests(prompts=3)
    for folder in folders:
        write_canary(folder, rows[0], np.arange(100, 140, dtype=np.int32))
    sampler = VllmSampler(student(folders[0]), RolloutConfig(vllm=VllmOptions(**SMALL)))
    sampler.load_policy(student(folders[0]))
    first = sampler.loaded
    for folder in [*folders, folders[0]]:
        sampler.load_policy(student(folder))
        assert sampler.loaded is first
        found = by_key(sampler, rows)
        for key, expected in logprobs_of(folder, rows, found).items():
            np.testing.assert_allclose(found[key].sampling_logprobs, expected, atol=2e-5, rtol=0)
    sampler.close()


def test_weights_that_do_not_prove_to_be_the_policys_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    folder = save_model(tiny_qwen2(seed=12, hidden_size=128, max_position_embeddings=256), tmp_path / "policy")
    write_canary(folder, requests(1)[0], np.arange(100, 140, dtype=np.int32))
    content = json.loads((folder / CANARY).read_text())
    content["logprobs"][3] -= 0.01
    (folder / CANARY).write_text(json.dumps(content))
    sampler = VllmSampler(student(teacher_folder), RolloutConfig(vllm=VllmOptions(**SMALL)))
    sampler.load_policy(student(teacher_folder))
    with pytest.raises(ModelError, match=r"policy: vLLM's log-probs of the canary differ by up to 0.01 nats"):
        sampler.load_policy(student(folder))
    sampler.close()
