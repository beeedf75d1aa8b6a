"""The transformers scorer against a plain log-softmax over full logits, one sequence at a time, without any batching."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_model, tiny_qwen2
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)  # fmt: skip

from opd_cache import models
from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError, ModelError
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest, TokenScores

BOS = 2


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(6)
    config = GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=BOS,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_mistral() -> PreTrainedModel:
    """With a window that is shorter than most sequences."""
    torch.manual_seed(7)
    config = MistralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=6, bos_token_id=BOS, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


ARCHITECTURES = {
    "qwen2": lambda: tiny_qwen2(seed=4), "llama": tiny_llama, "gpt2": tiny_gpt2, "mistral": tiny_mistral,
}  # fmt: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    model = ARCHITECTURES[request.param]()
    return save_model(model, tmp_path_factory.mktemp(request.param)), model


def request(key: int, group: int, prompt: Sequence[int], response: Sequence[int]) -> ScoreRequest:
    return ScoreRequest(key, np.array(prompt, np.int32), np.array(response, np.int32), group)


def requests(with_bos: bool, num_prompts: int = 9) -> list[ScoreRequest]:
    """Groups of 3: many lengths, and an empty, a one-token and a truncated response among them."""
    rng = np.random.default_rng(0)
    rows: list[ScoreRequest] = []
    for group in range(num_prompts):
        prompt = [*([BOS] if with_bos else []), *rng.integers(3, 258, rng.integers(1, 12))]
        lengths = [0, 1, int(rng.integers(2, 20))] if group % 2 else rng.integers(1, 24, 3)
        for sample, length in enumerate(lengths):
            ids = rng.integers(3, 258, length).tolist()
            rows.append(request(len(rows), group, prompt, ids if sample == 2 or not length else [*ids[:-1], 1]))
    return rows


def score(folder: Path, rows: list[ScoreRequest], top_k: int = 0, **options: object) -> list[TokenScores]:
    scorer = HFScorer(TeacherConfig(model=str(folder), dtype="float32", device="cpu"), ScoreConfig(**options))
    found = {scores.key: scores for scores in scorer.score(rows, top_k)}
    assert sorted(found) == list(range(len(rows)))
    return [found[key] for key in range(len(rows))]


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, row: ScoreRequest) -> torch.Tensor:
    """[R, V] in float64: logits at i − 1 predict token i."""
    ids = torch.tensor([[*row.prompt_ids.tolist(), *row.response_ids.tolist()]])
    logits = model(input_ids=ids).logits[0].double()
    start = len(row.prompt_ids)
    return logits[start - 1 : start - 1 + len(row.response_ids)].log_softmax(-1)


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("share_prompts", ["never", "always", "auto"])
def test_scores_equal_a_plain_log_softmax(
    teacher: tuple[Path, PreTrainedModel], with_bos: bool, share_prompts: str
) -> None:
    folder, model = teacher
    rows = requests(with_bos)
    for row, found in zip(
        rows, score(folder, rows, share_prompts=share_prompts, max_tokens_per_batch=150), strict=True
    ):
        expected = plain_logprobs(model, row)
        own = expected.gather(-1, torch.from_numpy(row.response_ids).long()[:, None]).squeeze(-1)
        assert found.logprobs.dtype == np.float32
        assert found.logprobs.shape == (len(row.response_ids),)
        np.testing.assert_allclose(found.logprobs, own.numpy(), atol=1e-5, rtol=0)
        ranks = (expected > own[:, None]).sum(-1) + 1
        np.testing.assert_array_equal(found.rank, ranks.numpy())
        assert (found.key, found.error) == (row.key, None)


def test_top_k_holds_the_likeliest_tokens_in_order_and_the_sampled_one_beside_them(
    teacher: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = teacher
    rows = requests(with_bos=False)
    for row, found in zip(rows, score(folder, rows, top_k=5), strict=True):
        assert found.topk_ids.shape == found.topk_logprobs.shape == (len(row.response_ids), 5)
        expected = plain_logprobs(model, row)
        np.testing.assert_allclose(found.topk_logprobs, expected.topk(5).values.numpy(), atol=1e-5, rtol=0)
        at_ids = expected.gather(-1, torch.from_numpy(found.topk_ids).long())
        np.testing.assert_allclose(found.topk_logprobs, at_ids.numpy(), atol=1e-5, rtol=0)
        listed = (found.topk_ids == row.response_ids[:, None]).any(-1)
        np.testing.assert_array_equal(listed, found.rank <= 5)


@pytest.mark.parametrize("rows_of", [(7, 7), (7, 3), (1, 1)], ids=["chunks", "chunks_in_pieces", "rows"])
def test_the_lm_head_in_small_chunks_changes_nothing(
    teacher: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, rows_of: tuple[int, int]
) -> None:
    folder, _ = teacher
    rows = requests(with_bos=False)
    whole = score(folder, rows, top_k=3)
    for budget, size in zip(("LOGITS_BYTES", "PIECE_BUDGET"), rows_of, strict=True):
        monkeypatch.setattr(f"opd_cache.score.scorers.hf.{budget}", size)
    monkeypatch.setattr("opd_cache.score.scorers.hf._rows_of", lambda budget, vocab_size: budget)
    for one, other in zip(whole, score(folder, rows, top_k=3), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)


def test_a_row_beyond_the_context_is_an_error_row_and_shifts_nothing(teacher: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = teacher
    rows = requests(with_bos=False, num_prompts=3)
    too_long = request(0, 99, range(3, 43), range(3, 28))
    alone = score(folder, rows)
    together = score(folder, [replace(row, key=key) for key, row in enumerate([*rows[:4], too_long, *rows[4:]])])
    assert together[4].error == "65 tokens, the teacher's context is 64"
    assert len(together[4].logprobs) == 0
    for one, other in zip(alone, [*together[:4], *together[5:]], strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_a_response_that_fills_the_context_exactly_is_scored(teacher: tuple[Path, PreTrainedModel]) -> None:
    folder, model = teacher
    row = request(0, 0, range(3, 43), range(3, 27))
    for share_prompts in ("never", "always"):
        (found,) = score(folder, [row], share_prompts=share_prompts)
        expected = plain_logprobs(model, row).gather(-1, torch.from_numpy(row.response_ids).long()[:, None])
        np.testing.assert_allclose(found.logprobs, expected.squeeze(-1).numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share_prompts", ["never", "always"])
def test_batches_stay_within_the_token_budget(
    teacher: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, share_prompts: str
) -> None:
    folder, _ = teacher
    sizes: list[int] = []
    original = models.LanguageModel.hidden

    def recording(self: models.LanguageModel, ids: torch.Tensor, mask: torch.Tensor, **options: object) -> torch.Tensor:
        sizes.append(ids.numel())
        return original(self, ids, mask, **options)

    options = ScoreConfig(share_prompts=share_prompts, max_tokens_per_batch=100)
    scorer = HFScorer(TeacherConfig(model=str(folder), dtype="float32"), options)
    scorer.load()
    monkeypatch.setattr(models.LanguageModel, "hidden", recording)
    rows = requests(with_bos=False)
    assert len(list(scorer.score(rows, 0))) == 27
    assert len(sizes) > 3
    assert max(sizes) <= 100
    # The last token of a response predicts nothing; a prompt is computed once in a batch, or once for each response.
    responses = [row.response_ids[:-1] for row in rows]
    least = sum(map(len, responses)) + sum(len(rows[first].prompt_ids) for first in range(0, 27, 3))
    assert sum(sizes) < 1.2 * least if share_prompts == "always" else sum(sizes) > 1.2 * least


def test_always_sharing_prompts_is_refused_where_the_attention_cannot(teacher: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = teacher
    config = TeacherConfig(model=str(folder), dtype="float32", attn_implementation="eager")
    with pytest.raises(ConfigError) as error:
        HFScorer(config, ScoreConfig(share_prompts="always")).load()
    assert str(error.value) == (
        f"score.share_prompts = always, but the attention of teacher {str(folder)!r} (eager) cannot share prompts; use auto."
    )
    scorer = HFScorer(config, ScoreConfig())
    assert len(list(scorer.score(requests(with_bos=False), 0))) == 27


def test_logits_that_are_changed_after_the_head_are_refused() -> None:
    class Scaled(type(tiny_qwen2(seed=0))):  # type: ignore[misc]
        def forward(self, *arguments: object, **options: object) -> object:
            output = super().forward(*arguments, **options)
            output.logits = output.logits * 0.5
            return output

    model = models.LanguageModel(Scaled(tiny_qwen2(seed=0).config).eval(), "somewhere/scaled")
    with pytest.raises(ModelError, match=r"somewhere/scaled: a Scaled changes its logits after the LM head"):
        model.check_split()
