"""The division of a global batch into ranks and micro-batches, and sequences that share one without padding."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import save_model, tiny_qwen2
from hypothesis import given
from hypothesis import strategies as st

from opd_cache.config import ModelConfig
from opd_cache.errors import ModelError
from opd_cache.learn.batch import micro_batches
from opd_cache.learn.divide import Layout, RowSize, divide, divide_worthwhile, positions
from opd_cache.learn.student import Student
from opd_cache.models import load_model
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score

LAYOUTS = get_args(Layout)


def joined_row(prompt: list[int], response: list[int], sample: int = 0) -> Joined:
    ids, logprobs = np.array(response, np.int32), -np.ones(len(response), np.float32)
    rollout = Rollout(f"0/0/{sample}", 0, sample, np.array(prompt, np.int32), ids, logprobs, "stop", 0)
    topk = np.zeros((len(ids), 0))
    score = Score(
        rollout.rollout_id,
        rollout.ids_hash,
        logprobs,
        np.ones_like(ids),
        topk.astype(np.int32),
        topk.astype(np.float32),
    )
    return rollout, score


sizes_of_rows = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=8)), min_size=1, max_size=12
).map(
    lambda prompts: [
        RowSize(prompt, response, number) for number, (prompt, its) in enumerate(prompts) for response in its
    ]
)


@given(sizes_of_rows, st.integers(1, 5), st.integers(1, 200), st.sampled_from(LAYOUTS))
def test_every_row_is_in_exactly_one_micro_batch_of_one_rank(
    sizes: list[RowSize], world: int, budget: int, layout: Layout
) -> None:
    ranks = divide(sizes, world, budget, layout)
    assert len(ranks) == world
    assert Counter(row for rank in ranks for micro in rank for row in micro) == Counter(range(len(sizes)))
    for micro in (micro for rank in ranks for micro in rank):
        assert positions(micro, sizes, layout) <= budget or len(micro) == 1


@given(st.lists(st.integers(1, 90), min_size=40, max_size=80), st.integers(2, 4))
def test_ranks_get_nearly_the_same_number_of_tokens(lengths: list[int], world: int) -> None:
    sizes = [RowSize(1, length, number) for number, length in enumerate(lengths)]
    loads = [sum(lengths[row] for micro in rank for row in micro) for rank in divide(sizes, world, 100, "padded")]
    assert max(loads) - min(loads) <= max(lengths)


@given(st.lists(st.integers(5, 50), min_size=8, max_size=8), st.integers(1, 4))
def test_ranks_share_out_even_the_responses_of_a_single_prompt(lengths: list[int], world: int) -> None:
    sizes = [RowSize(10, length) for length in lengths]
    ranks = divide(sizes, world, 10**6, "shared")
    loads = [sum(positions(micro, sizes, "shared") for micro in rank) for rank in ranks]
    assert max(loads) <= sum(loads) / world + 10 + 2 * max(lengths)


def test_one_rank_computes_a_prompt_once_where_the_budget_allows() -> None:
    sizes = [RowSize(100, 50, number) for number in (0, 0, 0, 0, 1, 1)]
    assert divide(sizes, 1, 300, "shared") == [[[0, 1, 2, 3], [4, 5]]]
    # 200 take two responses of a prompt.
    assert divide(sizes, 1, 200, "shared") == [[[0, 1], [2, 3], [4, 5]]]


def test_prompts_are_shared_where_that_saves_a_tenth_of_the_positions() -> None:
    alone = [RowSize(100, 50, number) for number in range(4)]
    assert divide_worthwhile(alone, 1, 1000, "shared")[0] == "padded"
    assert divide_worthwhile(alone, 1, 1000, "packed")[0] == "packed"
    assert divide_worthwhile([RowSize(100, 50, number // 2) for number in range(4)], 1, 1000, "shared")[0] == "shared"
    # Nothing is shared, but lengths differ.
    assert (
        divide_worthwhile([RowSize(10, 10 + 50 * number, number) for number in range(4)], 1, 1000, "shared")[0]
        == "shared"
    )


@given(sizes_of_rows, st.integers(1, 4), st.integers(1, 200), st.sampled_from(LAYOUTS))
def test_every_rank_runs_as_many_micro_batches_and_each_token_counts_once(
    sizes: list[RowSize], world: int, budget: int, layout: Layout
) -> None:
    rows = [
        joined_row([size.prompt_number] * size.prompt, list(range(2, 2 + size.response)), sample)
        for sample, size in enumerate(sizes)
    ]
    ranks = [list(micro_batches(rows, [0.0] * len(rows), budget, layout, rank, world)) for rank in range(world)]
    assert len({len(micros) for micros in ranks}) == 1
    counted = [token for micros in ranks for micro in micros if micro.counts for token in micro.target_ids_N.tolist()]
    assert Counter(counted) == Counter(token for size in sizes for token in range(2, 2 + size.response))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_is_predicted_from_the_position_before_it(layout: Layout) -> None:
    rows = [joined_row([11, 12, 13], [14, 15]), joined_row([21], [22, 23, 24, 25]), joined_row([21], [33])]
    (micro,) = micro_batches(rows, [0.5, -0.5, 0.0], 100, layout)
    flat = micro.input_ids_BT.flatten()
    before = {14: 13, 15: 14, 22: 21, 23: 22, 24: 23, 25: 24, 33: 21}
    assert dict(zip(micro.target_ids_N.tolist(), flat[micro.predictor_N].tolist(), strict=True)) == before
    by_token = dict(zip(micro.target_ids_N.tolist(), micro.reward_advantages_N.tolist(), strict=True))
    assert by_token == {14: 0.5, 15: 0.5, 22: -0.5, 23: -0.5, 24: -0.5, 25: -0.5, 33: 0.0}
    assert len(set(micro.row_N.tolist())) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_predicts_no_token_with_a_loss_is_not_computed(layout: Layout) -> None:
    rows = [joined_row([11, 12], [13, 14, 15, 16]), joined_row([11, 12], [17, 18, 19])]
    masks = [np.array([False, True, False, False]), np.array([True, False, True])]
    rows = [(replace(rollout, loss_mask=mask), score) for (rollout, score), mask in zip(rows, masks, strict=True)]
    (micro,) = micro_batches(rows, [0.0, 0.0], 100, layout)
    assert not {14, 15, 16, 19} & set(micro.input_ids_BT.flatten().tolist())
    before = micro.input_ids_BT.flatten()[micro.predictor_N].tolist()
    assert sorted(zip(micro.target_ids_N.tolist(), before, strict=True)) == [(14, 13), (17, 12), (19, 18)]


def student_of(tmp_path_factory: pytest.TempPathFactory, attention: str) -> Student:
    folder = save_model(tiny_qwen2(seed=1), tmp_path_factory.mktemp("student"))
    return Student(load_model(ModelConfig(str(folder), device="cpu", attn_implementation=attention), "student"))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return student_of(tmp_path_factory, request.param)


def some_rows() -> list[Joined]:
    rng = np.random.default_rng(0)
    sizes = [(3, 4), (1, 9), (6, 1), (2, 2)]
    return [
        joined_row(rng.integers(2, 258, prompt).tolist(), rng.integers(2, 258, response).tolist(), sample)
        for sample, (prompt, response) in enumerate(sizes)
    ]


def test_packed_sequences_do_not_see_their_neighbours(student: Student) -> None:
    rows = some_rows()
    (packed,) = micro_batches(rows, [0.0] * 4, 100, "packed")
    assert packed.input_ids_BT.shape == (1, sum(rollout.num_tokens - 1 for rollout, _ in rows))
    together = student.sampled_logprobs(packed)
    # By length, longest first, as the division orders them.
    order = sorted(range(4), key=lambda row: -rows[row][0].num_tokens)
    alone = [student.sampled_logprobs(next(micro_batches([rows[row]], [0.0], 100))) for row in order]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


def test_another_neighbour_changes_nothing(student: Student) -> None:
    rows = some_rows()
    (before,) = micro_batches(rows, [0.0] * 4, 100, "packed")
    ids = before.input_ids_BT.clone()
    ids[0, : rows[1][0].num_tokens - 1] = 200  # the longest row comes first
    found = student.sampled_logprobs(replace(before, input_ids_BT=ids))
    others = before.row_N != before.row_N[0]
    expected = student.sampled_logprobs(before)
    torch.testing.assert_close(found[others], expected[others], atol=0, rtol=0)
    assert not torch.equal(found[~others], expected[~others])


def test_packing_is_refused_where_neighbours_would_see_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    student = student_of(tmp_path_factory, "eager")
    assert student.use_layout("always") == "packed"
    assert student.use_layout("auto") == "padded"
    hidden = student.model.hidden
    monkeypatch.setattr(
        student.model, "hidden", lambda ids, mask, **options: hidden(ids, torch.ones_like(ids))
    )  # one long sequence
    with pytest.raises(ModelError, match=r"packed sequences see each other. Use learn.packing=never"):
        student.use_layout("always")
