"""What only a GPU can show; skipped without one. The stages on it, their numbers against the CPU's, its memory filled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STOP_IDS, assert_verified, complete, differences, save_model, tiny_qwen2
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd_cache.config import ModelConfig, Recipe, RolloutConfig, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.learn.fused import check_fused, fused_logprobs
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import SampleRequest
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest, TokenScores
from opd_cache.store.plans import SamplingPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON_GPU = ("student.device=cuda", "teachers.main.device=cuda")
BFLOAT16 = ("student.dtype=bfloat16", "teachers.main.dtype=bfloat16")


def requests(count: int = 12) -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 258, rng.integers(4, 12)).astype(np.int32) for _ in range(count // 3)]
    lengths = rng.integers(1, 24, count)
    return [
        ScoreRequest(key, prompts[key // 3], rng.integers(3, 258, length).astype(np.int32), key // 3)
        for key, length in enumerate(lengths)
    ]


def scores(task: Path, device: str, dtype: str = "float32") -> list[TokenScores]:
    scorer = HFScorer(TeacherConfig(model=str(task / "teacher"), dtype=dtype, device=device), ScoreConfig(top_k=4))
    found = {one.key: one for one in scorer.score(requests(), 4)}
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_scores_are_those_of_the_cpu(task: Path, dtype: str, tolerance: float) -> None:
    for ours, expected in zip(scores(task, "cuda", dtype), scores(task, "cpu"), strict=True):
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=tolerance, rtol=0)
        np.testing.assert_allclose(ours.topk_logprobs, expected.topk_logprobs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deep_teacher_shares_prompts(tmp_path: Path, dtype: str) -> None:
    # In bfloat16 kernels for other shapes round otherwise, a bit more in every layer.
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
    deep = Qwen2ForCausalLM(Qwen2Config(vocab_size=258, num_key_value_heads=8, **shape))
    teacher = TeacherConfig(model=str(save_model(deep, tmp_path / "teacher")), dtype=dtype, device="cuda")
    HFScorer(teacher, ScoreConfig(share_prompts="always")).load()


def test_samples_are_those_of_the_cpu_in_float32(task: Path) -> None:
    plan = SamplingPlan(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=10, stop_token_ids=STOP_IDS)
    asked = [SampleRequest(row.key, row.prompt_ids, seed=row.key) for row in requests()]
    found = {}
    for device in ("cpu", "cuda"):
        student = ModelConfig(model=str(task / "student"), dtype="float32", device=device)
        sampler = HFSampler(student, RolloutConfig(batch_size=8))
        sampler.load_policy(student)
        found[device] = {one.key: one for one in sampler.sample(asked, plan)}
    for key, expected in found["cpu"].items():
        np.testing.assert_array_equal(found["cuda"][key].response_ids, expected.response_ids)
        np.testing.assert_allclose(found["cuda"][key].sampling_logprobs, expected.sampling_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [(), BFLOAT16], ids=["float32", "bfloat16"])
def test_a_run_is_whole_and_the_same_a_second_time(
    make_recipe: Callable[..., Recipe], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    runs = [complete(make_recipe(tmp_path / name, *ON_GPU, *settings)) for name in ("one", "two")]
    assert_verified(runs[0].dir.path)
    assert differences(*(run.dir.path for run in runs)) == []


@pytest.mark.filterwarnings("ignore")  # the compiler's advice to Liger
def test_ligers_kernel_agrees_with_the_plain_formula() -> None:
    pytest.importorskip("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    found = fused_logprobs("always", device, torch.bfloat16)
    assert found is not None
    torch.manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(n, 256, device=device, dtype=torch.bfloat16) for n in (64, 5000))

    def plain(hidden_NH, weight_VH, target_N, scale):  # type: ignore[no-untyped-def]
        logprobs_NV = ((hidden_NH @ weight_VH.t()).float() * scale).log_softmax(-1)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return logprobs_NV.gather(-1, target_N[:, None]).squeeze(1), entropy_N.detach()

    check_fused(found, plain, hidden_NH * 0.2, weight_VH)


def test_a_batch_that_fills_the_gpu_names_its_key(tmp_path: Path) -> None:
    model = tiny_qwen2(seed=1, vocab_size=100_000, max_position_embeddings=2048)
    teacher = TeacherConfig(model=str(save_model(model, tmp_path)), dtype="float32", device="cuda")
    scorer = HFScorer(teacher, ScoreConfig(max_tokens_per_batch=8192))
    scorer.load()
    ids = np.arange(3, 1000, dtype=np.int32)
    rows = [ScoreRequest(key, ids[:10], ids, key) for key in range(8)]
    room = torch.cuda.memory_reserved() + (256 << 20)  # of the 512 MiB that logits may take
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(ConfigError, match=r"^out of GPU memory with score.max_tokens_per_batch = 8192; lower it\."):
            list(scorer.score(rows, 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
