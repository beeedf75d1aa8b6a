"""How far the vLLM scorer's log-probs are from the hf scorer's, on the quickstart's models and at a real vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from helpers import tiny_qwen2
from near import assert_same_topk

from opd_cache.config import ModelConfig, RolloutConfig, ScoreConfig, TeacherConfig, VllmOptions
from opd_cache.quickstart.sort_letters import STUDENT, TEACHER, byte_tokenizer, make_problems, train_model
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import SampleRequest
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scorers.vllm import VllmScorer
from opd_cache.score.scores import Scorer, ScoreRequest, TokenScores
from opd_cache.store.plans import SamplingPlan
from opd_cache.types import Float32Array, Int32Array

TOP_K = 8
SAMPLES = 4
VOCABULARY = 151_936


def rollouts(folder: Path, prompts: Sequence[Int32Array], stop_ids: list[int]) -> list[ScoreRequest]:
    """Responses that the model itself samples."""
    student = ModelConfig(model=str(folder), dtype="float32", device="cpu")
    sampler = HFSampler(student, RolloutConfig(batch_size=48))
    sampler.load_policy(student)
    asked = [
        SampleRequest(len(prompts) * sample + group, prompt, seed=1000 * sample + group)
        for group, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]
    group_of = {request.key: request.key % len(prompts) for request in asked}
    samples = sampler.sample(asked, SamplingPlan(1.0, 1.0, None, 24, stop_ids))
    rows = [ScoreRequest(s.key, prompts[group_of[s.key]], s.response_ids, group_of[s.key]) for s in samples]
    return sorted(rows, key=lambda row: (row.group, row.key))


def scored(scorer: Scorer, rows: Sequence[ScoreRequest], top_k: int) -> list[TokenScores]:
    found = {scores.key: scores for scores in scorer.score(rows, top_k)}
    assert all(scores.error is None for scores in found.values())
    return [found[row.key] for row in rows]


def differences(
    folder: Path, rows: Sequence[ScoreRequest], dtype: str, top_ks: Sequence[int], atol: float
) -> dict[int, Float32Array]:
    """|vLLM - hf| of all log-probs of the rollouts, the top k's included, by top k. Says the figures."""
    teacher = TeacherConfig(model=str(folder), dtype=dtype, device="cpu")
    vllm = VllmScorer(teacher, ScoreConfig(top_k=TOP_K, vllm=VllmOptions(**SMALL, max_num_batched_tokens=512)))
    hf = HFScorer(teacher, ScoreConfig(top_k=TOP_K))
    found = {}
    for top_k in top_ks:
        pairs = list(zip(scored(vllm, rows, top_k), scored(hf, rows, top_k), strict=True))
        assert all(len(ours.logprobs) == len(theirs.logprobs) for ours, theirs in pairs)
        parts = [np.abs(ours.logprobs - theirs.logprobs) for ours, theirs in pairs]
        parts += [assert_same_topk(ours, theirs, atol).ravel() for ours, theirs in pairs]
        found[top_k] = np.concatenate(parts)
        spread = np.concatenate([theirs.logprobs for _, theirs in pairs]).std()
        print(
            f"{folder.name} {dtype}, k = {top_k}: max {found[top_k].max():.1e}, mean {found[top_k].mean():.1e}, {found[top_k].size} log-probs of deviation {spread:.1f}"
        )
    vllm.close()
    return found


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_quickstarts_models_score_alike_in_vllm_and_transformers(name: str, tmp_path: Path) -> None:
    """Its own shapes and training, cut short."""
    problems, held_out = make_problems(0)
    tokenizer = byte_tokenizer()
    shape = {"teacher": TEACHER, "student": STUDENT}[name]
    train_model({**shape, "steps": 16}, problems, tokenizer, 0, name).save_pretrained(tmp_path / name)
    prompts = [np.array(tokenizer(prompt)["input_ids"], np.int32) for prompt, _ in held_out[:24]]
    rows = rollouts(tmp_path / name, prompts, [tokenizer.eos_token_id])
    for found in differences(tmp_path / name, rows, "float32", [0, TOP_K], 2e-5).values():
        assert found.max() <= 2e-5


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ScoreRequest]]:
    """A model with the vocabulary of Qwen2 and a tied head, and rollouts of its own."""
    folder = tmp_path_factory.mktemp("models") / f"{VOCABULARY}"
    tiny_qwen2(seed=5, hidden_size=128, vocab_size=VOCABULARY, max_position_embeddings=256).save_pretrained(folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(1, 40)).astype(np.int32) for _ in range(8)]
    return folder, rollouts(folder, prompts, [1])


def test_at_a_real_vocabulary_float32_scores_are_the_same(large_vocabulary: tuple[Path, list[ScoreRequest]]) -> None:
    for found in differences(*large_vocabulary, "float32", [0, TOP_K], 2e-5).values():
        assert found.max() <= 2e-5


def test_at_a_real_vocabulary_bfloat16_scores_are_near(large_vocabulary: tuple[Path, list[ScoreRequest]]) -> None:
    """Of every other rollout: it is slow where the CPU has no such numbers."""
    folder, rows = large_vocabulary
    found = differences(folder, rows[::2], "bfloat16", [TOP_K], 0.3)[TOP_K]
    assert found.max() < 0.3
    assert found.mean() < 0.05
