"""Prompts that the learner's body computes once for all their responses: the same numbers as whole sequences."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import save_model, tiny_qwen2
from hypothesis import given
from hypothesis import strategies as st
from test_batch import joined_row

from opd_cache.config import ModelConfig
from opd_cache.learn.batch import MicroBatch, loss_places, micro_batches
from opd_cache.learn.recompute import recompute_activations
from opd_cache.learn.student import Student
from opd_cache.models import LanguageModel, load_model
from opd_cache.sequences import Group
from opd_cache.shared_attention import ATTENTION, attention_windows
from opd_cache.shared_prompts import shared_prompts
from opd_cache.store.join import Joined

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARING = {
    "Qwen2": SIZES, "Qwen3": {**SIZES, "head_dim": 8}, "Llama": SIZES, "Gemma": {**SIZES, "head_dim": 8},
    "Qwen3Moe": {**SIZES, **EXPERTS, "head_dim": 8}, "GPT2": GPT2, "Mistral": {**SIZES, "sliding_window": 4},
    "Gemma3Text": {**SIZES, "head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6},
}  # fmt: skip
NOT_SHARING = {
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def student_of(architecture: str, options: dict[str, object]) -> Student:
    torch.manual_seed(3)
    config = getattr(transformers, f"{architecture}Config")(**options)
    return Student(LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), architecture))


def some_rows(vocab_size: int = 97) -> list[Joined]:
    """Three prompts with one, three and two responses, of all lengths; one response with a loss on some tokens only."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, vocab_size, length).tolist() for length in (9, 4, 1)]
    sizes = [(0, 3), (1, 1), (1, 11), (1, 6), (2, 5), (2, 2)]
    rows = [
        joined_row(prompts[prompt], rng.integers(2, vocab_size, response).tolist(), sample)
        for sample, (prompt, response) in enumerate(sizes)
    ]
    rollout, score = rows[3]
    rows[3] = (replace(rollout, loss_mask=np.array([False, True, True, False, True, False])), score)
    return rows


def micro_batch(rows: list[Joined], layout: str) -> MicroBatch:
    """All in one, in the order of the rows."""
    whole = sorted(rows, key=lambda row: -row[0].num_tokens) if layout == "padded" else rows
    (micro,) = micro_batches(whole, [0.0] * len(rows), 10**6, layout)
    return micro


def logprobs_and_gradients(
    student: Student, micro: MicroBatch
) -> tuple[dict[tuple[int, ...], float], list[torch.Tensor]]:
    """(by_token, gradients of a weighted sum of the log-probs)."""
    hidden = student._hidden(micro)
    logits_NV = student.model.logits(hidden)
    logprobs_N = logits_NV.log_softmax(-1).gather(-1, micro.target_ids_N[:, None]).squeeze(-1)
    # Each token's weight follows from its id, so that it is the same in every order.
    student.module.zero_grad()
    (logprobs_N * (1 + micro.target_ids_N % 7)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in student.module.parameters() if parameter.grad is not None]
    return by_token(micro, logprobs_N), gradients


def by_token(micro: MicroBatch, logprobs_N: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Log-probs by a response's tokens, of which no two rows have the same, and the place among them."""
    found: dict[tuple[int, ...], float] = {}
    for row in range(int(micro.row_N.max()) + 1):
        its = micro.row_N == row
        tokens, values = micro.target_ids_N[its].tolist(), logprobs_N[its].tolist()
        found |= {(*tokens, place): value for place, value in enumerate(values)}
    return found


def assert_the_same(student: Student, rows: list[Joined]) -> None:
    expected, gradients = logprobs_and_gradients(student, micro_batch(rows, "padded"))
    micro = micro_batch(rows, "shared")
    prompts = {bytes(rollout.prompt_ids): len(rollout.prompt_ids) for rollout, _ in rows}
    seen = sum(int(loss_places(rollout)[-1]) for rollout, _ in rows)
    assert micro.input_ids_BT.shape == (1, sum(prompts.values()) + seen)
    found, shared_gradients = logprobs_and_gradients(student, micro)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=2e-5)
    assert len(shared_gradients) == len(gradients) > 5
    for one, other in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * other.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("architecture", SHARING)
def test_logprobs_and_gradients_are_those_of_whole_sequences(architecture: str) -> None:
    student = student_of(architecture, SHARING[architecture])
    assert student.use_layout("auto") == "shared"
    assert_the_same(student, some_rows())


def test_lengths_may_differ_a_lot() -> None:
    student = student_of("Qwen2", SIZES)
    assert student.use_layout("auto") == "shared"
    rng = np.random.default_rng(1)
    sizes = {150: [200, 1, 90, 210], 10: [3, 120], 70: [180], 1: [1, 77, 2]}
    rows = [
        joined_row(prompt_ids, rng.integers(2, 97, response).tolist())
        for prompt, its in sizes.items()
        for prompt_ids in [rng.integers(2, 97, prompt).tolist()]
        for response in its
    ]
    layout = micro_batch(rows, "shared").shared_prompts
    assert layout is not None
    assert len(layout.responses) > len(layout.whole) > 2
    assert_the_same(student, rows)


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(0, 900), min_size=1, max_size=9)), min_size=1, max_size=9
    )
)
def test_every_position_has_one_place_and_rectangles_little_else(groups: list[tuple[int, list[int]]]) -> None:
    layout = shared_prompts([Group(np.zeros(prompt), [np.zeros(count) for count in its]) for prompt, its in groups])
    positions = torch.arange(sum(prompt + sum(its) for prompt, its in groups))
    assert torch.equal(layout.source_N[layout.place_T], positions)
    assert int((~layout.is_filler_N1).sum()) == len(positions)
    rectangles = [*(part.rectangle for part in layout.whole), *(part.rectangle for part in layout.responses)]
    assert [one.number for one in rectangles] == list(range(len(rectangles)))
    assert sum(one.rows * one.width for one in rectangles) == len(layout.source_N)
    assert all(part.prompts in rectangles[: len(layout.whole)] for part in layout.responses)
    num_rows = sum(one.rows for one in rectangles)
    assert len(layout.source_N) <= len(positions) / 0.7 + num_rows * (64 + 8)
    assert sum(sum(count for _, count in part.of_prompt) for part in layout.responses) == sum(
        sum(count > 0 for count in its) for _, its in groups if len(its) > 1
    )


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activations_can_be_computed_again(how: str) -> None:
    student = student_of("Qwen2", SIZES)
    assert student.use_layout("auto") == "shared"
    expected, gradients = logprobs_and_gradients(student, micro_batch(some_rows(), "shared"))
    recompute_activations(student.module, how)
    found, again = logprobs_and_gradients(student, micro_batch(some_rows(), "shared"))
    assert found == expected
    assert all(torch.equal(one, other) for one, other in zip(again, gradients, strict=True))


def test_another_response_or_prompt_changes_nothing() -> None:
    student = student_of("Llama", SIZES)
    assert student.use_layout("auto") == "shared"
    micro = micro_batch(some_rows(), "shared")
    with torch.no_grad():
        before = student._hidden(micro)
        ids = micro.input_ids_BT.clone()
        ids[0, 9 + 2 + 4 : 9 + 2 + 4 + 10] = 50  # the second prompt's second response
        ids[0, -6] = 60  # the third prompt
        after = student._hidden(replace(micro, input_ids_BT=ids))
    changed = (micro.row_N == 2) | (micro.row_N >= 4)
    # A response's first token is predicted from the prompt alone.
    changed[(micro.row_N == 2).nonzero()[0]] = False
    assert torch.equal(after[~changed], before[~changed])
    assert all(not torch.equal(one, other) for one, other in zip(after[changed], before[changed], strict=True))


@pytest.mark.parametrize("architecture", NOT_SHARING)
def test_models_that_cannot_share_get_padded_rows(architecture: str) -> None:
    student = student_of(architecture, NOT_SHARING[architecture])
    attention = student.module.config._attn_implementation
    assert student.use_layout("auto") == "padded"
    assert student.module.config._attn_implementation == attention


def test_windows_are_those_of_the_layers() -> None:
    def windows(config: transformers.PretrainedConfig) -> object:
        return attention_windows(SimpleNamespace(module=SimpleNamespace(config=config)))  # type: ignore[arg-type]

    assert windows(transformers.LlamaConfig(num_hidden_layers=2)) == (None, None)
    layers = ["sliding_attention", "full_attention"]
    assert windows(transformers.Gemma3TextConfig(num_hidden_layers=2, sliding_window=9, layer_types=layers)) == (
        9,
        None,
    )
    # Positions of a chunk see no other chunk: no window says that.
    assert windows(transformers.Llama4TextConfig(num_hidden_layers=2)) is None


def test_a_model_that_keeps_the_layout_from_its_attention_gets_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of("Qwen2", SIZES)
    hidden = student.model.hidden
    monkeypatch.setattr(
        student.model, "hidden", lambda ids, mask, shared_prompts=None, **options: hidden(ids, mask, **options)
    )
    assert student.use_layout("auto") == "padded"
    assert student.module.config._attn_implementation == "sdpa"


def test_never_packing_leaves_the_model_as_it_is() -> None:
    student = student_of("Qwen2", SIZES)
    assert student.use_layout("never") == "padded"
    assert student.module.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_name_the_attention(tmp_path: Path) -> None:
    folder = save_model(tiny_qwen2(seed=1), tmp_path / "model")
    student = Student(load_model(ModelConfig(str(folder), device="cpu"), "student"))
    student.module.save_pretrained(tmp_path / "before")
    assert student.use_layout("auto") == "shared"
    student.module.save_pretrained(tmp_path / "after")
    assert ATTENTION not in (tmp_path / "after/config.json").read_text()
    assert (tmp_path / "after/config.json").read_bytes() == (tmp_path / "before/config.json").read_bytes()
