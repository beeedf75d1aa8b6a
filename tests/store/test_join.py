"""The join of rollouts and scores refuses every row that does not fit, and says where and what to do."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_helpers import (
    ROLLOUT_COMMAND,
    SCORE_COMMAND,
    make_rollouts,
    make_scores,
    publish_rollouts,
    publish_scores,
    rollout_set,
    same_rows,
    score_set,
)

from opd_cache.errors import AlignmentError, CorruptShardError, StoreError
from opd_cache.store.join import join_shard, join_stages, read_rollouts
from opd_cache.store.shards import ShardSet
from opd_cache.types import Rollout, Score

TOP_K = 4
ROW = 6  # of ten; its response has several tokens
ROWS = make_rollouts(10)
SCORES = make_scores(ROWS, TOP_K)


def write(run: Path, rows: list[Rollout], row_scores: list[Score]) -> tuple[ShardSet, ShardSet]:
    rollouts, scores = rollout_set(run), score_set(run, top_k=TOP_K)
    publish_rollouts(rollouts, 0, rows)
    publish_scores(scores, 0, row_scores, rows_per_group=4)
    return rollouts, scores


def with_row(rows: list, change: Callable) -> list:
    return [*rows[:ROW], change(rows[ROW]), *rows[ROW + 1 :]]


def joined(rollouts: ShardSet, scores: ShardSet, start_row: int = 0) -> list[tuple[Rollout, Score]]:
    return list(join_stages(rollouts, scores, start_row))


def assert_refused_at_row(kind: type[StoreError], shards: ShardSet, command: str, action: Callable, said: str) -> None:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert message.startswith(f"{shards.path(0)} row {ROW}: "), message
    assert re.search(said, message), message
    assert message.endswith(f"run: {command}"), message
    assert "\n" not in message


def shorter(name: str) -> Callable[[Rollout | Score], Rollout | Score]:
    return lambda row: replace(row, **{name: getattr(row, name)[:-1]})


def holding(name: str, value: float) -> Callable[[Rollout | Score], Rollout | Score]:
    def change(row: Rollout | Score) -> Rollout | Score:
        values = getattr(row, name).copy()
        values.reshape(-1)[-1] = value
        return replace(row, **{name: values})

    return change


def test_scores_join_their_rollouts(tmp_path):
    pairs = joined(*write(tmp_path, ROWS, SCORES))
    assert same_rows([rollout for rollout, _ in pairs], ROWS)
    assert same_rows([score for _, score in pairs], SCORES)


MISALIGNED = {
    "another rollout": (lambda score: replace(score, rollout_id="3/99/0"), "scores 3/99/0, expected 3/3/0"),
    "other token ids": (lambda score: replace(score, ids_hash=score.ids_hash ^ 1), "scores other token ids, expected"),
    "teacher_logprobs short": (shorter("teacher_logprobs"), r"teacher_logprobs has \d+ values, response_ids has \d+"),
    "teacher_rank short": (shorter("teacher_rank"), r"teacher_rank has \d+ values, response_ids has \d+"),
    "topk_ids a token short": (shorter("topk_ids"), r"topk_ids has \d+ values, expected 4 for each of \d+"),
    "topk_logprobs a token short": (shorter("topk_logprobs"), r"topk_logprobs has \d+ values, expected 4 for each"),
    "topk_ids an entry short": (
        lambda score: replace(score, topk_ids=score.topk_ids.reshape(-1)[:-1]),
        r"topk_ids has \d+ values, expected 4 for each",
    ),
    "topk_ids one a token": (
        lambda score: replace(score, topk_ids=score.topk_ids[:, :1]),
        r"topk_ids has \d+ values, expected 4 for each",
    ),
    "half the top k in both lists": (
        lambda score: replace(score, topk_ids=score.topk_ids[:, :2], topk_logprobs=score.topk_logprobs[:, :2]),
        r"topk_ids has \d+ values, expected 4 for each",
    ),
    "one entry more than the top k": (
        lambda score: replace(
            score,
            topk_ids=np.pad(score.topk_ids, ((0, 0), (0, 1))),
            topk_logprobs=np.pad(score.topk_logprobs, ((0, 0), (0, 1))),
        ),
        r"topk_ids has \d+ values, expected 4 for each",
    ),
    "all lists empty without an error": (
        lambda score: replace(
            score,
            teacher_logprobs=score.teacher_logprobs[:0],
            teacher_rank=score.teacher_rank[:0],
            topk_ids=score.topk_ids[:0],
            topk_logprobs=score.topk_logprobs[:0],
        ),
        "teacher_logprobs has 0 values",
    ),
}


@pytest.mark.parametrize("case", MISALIGNED)
@pytest.mark.parametrize("start_row", [0, ROW])
def test_score_row_that_does_not_fit_is_refused(tmp_path, case, start_row):
    change, said = MISALIGNED[case]
    rollouts, scores = write(tmp_path, ROWS, with_row(SCORES, change))
    assert_refused_at_row(AlignmentError, scores, SCORE_COMMAND, lambda: joined(rollouts, scores, start_row), said)


def test_rows_before_a_refused_one_are_given(tmp_path):
    pairs = join_shard(*write(tmp_path, ROWS, with_row(SCORES, shorter("teacher_rank"))), 0)
    assert [next(pairs)[0].rollout_id for _ in range(ROW)] == [row.rollout_id for row in ROWS[:ROW]]
    with pytest.raises(AlignmentError):
        next(pairs)


def test_swapped_score_rows_are_refused(tmp_path):
    swapped = [*SCORES[:ROW], SCORES[ROW + 1], SCORES[ROW], *SCORES[ROW + 2 :]]
    rollouts, scores = write(tmp_path, ROWS, swapped)
    assert_refused_at_row(
        AlignmentError, scores, SCORE_COMMAND, lambda: joined(rollouts, scores), "scores 3/3/1, expected 3/3/0"
    )


def test_scores_of_other_rollouts_with_the_same_ids_are_refused(tmp_path):
    others = make_rollouts(10, seed=77)
    assert [row.rollout_id for row in others] == [row.rollout_id for row in ROWS]
    with pytest.raises(AlignmentError, match="row 0: scores other token ids, expected 3/0/0"):
        joined(*write(tmp_path, ROWS, make_scores(others, TOP_K)))


@pytest.mark.parametrize("start_row", [0, ROW, 9])
def test_missing_and_surplus_score_rows_are_refused(tmp_path, start_row):
    rollouts, scores = write(tmp_path / "short", ROWS, SCORES[:-1])
    with pytest.raises(AlignmentError) as caught:
        joined(rollouts, scores, start_row)
    expected = f"{scores.path(0)}: ends before row 9, 3/4/1. Delete the file and its seal and run: {SCORE_COMMAND}"
    assert str(caught.value) == expected
    rollouts, scores = write(tmp_path / "long", ROWS[:-1], SCORES)
    with pytest.raises(AlignmentError) as caught:
        list(join_shard(rollouts, scores, 0, start_row))
    assert str(caught.value).startswith(f"{scores.path(0)}: has more rows than its rollouts (9)")
    assert str(caught.value).endswith(SCORE_COMMAND)


@pytest.mark.parametrize("value", [np.nan, 1e-6, np.inf])
@pytest.mark.parametrize("name", ["teacher_logprobs", "topk_logprobs"])
def test_impossible_teacher_logprob_is_refused(tmp_path, name, value):
    rollouts, scores = write(tmp_path, ROWS, with_row(SCORES, holding(name, value)))
    said = f"{name} holds ({'NaN' if np.isnan(value) else f'{value:.6g}'}); a log-prob is at most 0"
    assert_refused_at_row(CorruptShardError, scores, SCORE_COMMAND, lambda: joined(rollouts, scores), said)


@pytest.mark.parametrize("value", [np.nan, 1e-6, np.inf])
@pytest.mark.parametrize("name", ["sampling_logprobs", "raw_logprobs"])
def test_impossible_student_logprob_is_refused(tmp_path, name, value):
    shards = write_with_raw(tmp_path, holding(name, value))
    said = f"{name} holds .*; a log-prob is at most 0"
    assert_refused_at_row(CorruptShardError, shards, ROLLOUT_COMMAND, lambda: list(read_rollouts(shards, 0)), said)


@pytest.mark.parametrize("name", ["sampling_logprobs", "raw_logprobs", "response_ids"])
def test_student_list_an_entry_short_is_refused(tmp_path, name):
    shards = write_with_raw(tmp_path, shorter(name))
    said = r"_logprobs has \d+ values, response_ids has \d+"
    assert_refused_at_row(CorruptShardError, shards, ROLLOUT_COMMAND, lambda: list(read_rollouts(shards, 0)), said)


def write_with_raw(run: Path, change: Callable) -> ShardSet:
    shards = rollout_set(run, raw_logprobs=True)
    rows = [replace(row, raw_logprobs=row.sampling_logprobs * np.float32(0.5)) for row in ROWS]
    publish_rollouts(shards, 0, with_row(rows, change))
    return shards


def test_logprob_of_minus_infinity_is_a_value(tmp_path):
    rows = with_row(ROWS, holding("sampling_logprobs", -np.inf))
    row_scores = with_row(with_row(SCORES, holding("teacher_logprobs", -np.inf)), holding("topk_logprobs", -np.inf))
    rollout, score = joined(*write(tmp_path, rows, row_scores))[ROW]
    assert rollout.sampling_logprobs[-1] == score.teacher_logprobs[-1] == score.topk_logprobs[-1, -1] == -np.inf


def test_row_that_could_not_be_scored_keeps_its_place(tmp_path):
    def fail(score: Score) -> Score:
        empty = {name: getattr(score, name)[:0] for name in ("teacher_logprobs", "teacher_rank")}
        topk = {name: getattr(score, name)[:0] for name in ("topk_ids", "topk_logprobs")}
        return replace(score, error="prompt and response exceed the teacher's context", **empty, **topk)

    pairs = joined(*write(tmp_path, ROWS, with_row(SCORES, fail)))
    assert [score.error is not None for _, score in pairs] == [row == ROW for row in range(10)]
    assert pairs[ROW][1].topk_ids.shape == (0, TOP_K)


def test_empty_responses_join_with_their_empty_scores(tmp_path):
    pairs = joined(*write(tmp_path, ROWS, SCORES))
    empty = [(rollout, score) for rollout, score in pairs if len(rollout.response_ids) == 0]
    assert [rollout.rollout_id for rollout, _ in empty] == ["3/1/1"]
    assert len(empty[0][0].prompt_ids) > 0
    assert empty[0][1].teacher_logprobs.shape == (0,)
    assert empty[0][1].topk_logprobs.shape == (0, TOP_K)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory) -> tuple[ShardSet, ShardSet, list[str]]:
    """Rollouts in row groups of 256, scores in row groups of 64, and the ids in planned order."""
    run = tmp_path_factory.mktemp("three_shards")
    rollouts, scores = rollout_set(run, num_shards=3), score_set(run, num_shards=3, top_k=TOP_K)
    rows = make_rollouts(720, seed=4, mean_length=4)
    for shard, part in enumerate([rows[:300], rows[300:560], rows[560:]]):
        publish_rollouts(rollouts, shard, part, rows_per_group=256)
        publish_scores(scores, shard, make_scores(part, TOP_K), rows_per_group=64)
    return rollouts, scores, [row.rollout_id for row in rows]


def test_row_groups_of_different_sizes_join(three_shards):
    rollouts, scores, expected = three_shards
    with rollouts.open(0) as left, scores.open(0) as right:
        assert (left.num_row_groups, right.num_row_groups) == (2, 5)
    pairs = joined(rollouts, scores)
    assert [rollout.rollout_id for rollout, _ in pairs] == expected
    assert all(rollout.ids_hash == score.ids_hash for rollout, score in pairs)


@pytest.mark.parametrize("start_row", [1, 63, 64, 65, 255, 256, 257, 299, 300, 301, 555, 556, 559, 560, 719, 720])
def test_join_from_any_row_is_the_tail_of_the_whole_join(three_shards, start_row):
    rollouts, scores, _ = three_shards
    whole, tail = joined(rollouts, scores), joined(rollouts, scores, start_row)
    assert same_rows([rollout for rollout, _ in tail], [rollout for rollout, _ in whole[start_row:]])
    assert same_rows([score for _, score in tail], [score for _, score in whole[start_row:]])


def test_damage_behind_the_start_row_is_not_read(three_shards, tmp_path):
    rollouts, scores = write(tmp_path, ROWS, with_row(SCORES, shorter("teacher_rank")))
    assert len(joined(rollouts, scores, ROW + 1)) == len(ROWS) - ROW - 1
