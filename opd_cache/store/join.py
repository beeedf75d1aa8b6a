"""Rollouts and scores side by side. Aligned shards are zipped, and every row is checked: id, ids hash, lengths, values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from opd_cache.errors import AlignmentError, CorruptShardError
from opd_cache.store.columns import fits, is_even, row_groups
from opd_cache.store.rows import STUDENT_TOPK, rollouts_of, scores_of
from opd_cache.store.shards import ShardSet
from opd_cache.types import Rollout, Score

Joined = tuple[Rollout, Score]


def join_stages(rollouts: ShardSet, scores: ShardSet, start_row: int = 0) -> Iterator[Joined]:
    """Every rollout with its score in planned order, from row `start_row` of the whole stage on.

    Memory: one row group of each side. Raises AlignmentError where a score belongs to another rollout,
    CorruptShardError on damage or impossible values.
    """
    for shard, skip in shards_from(rollouts, start_row):
        yield from join_shard(rollouts, scores, shard, skip)


def shards_from(rollouts: ShardSet, start_row: int) -> Iterator[tuple[int, int]]:
    """(shard, its first row that is wanted) of all shards with rows from row `start_row` of the whole stage on."""
    skip = start_row
    for shard in range(rollouts.num_shards):
        if skip == 0:
            yield shard, 0
            continue
        with rollouts.open(shard) as left:
            num_rows = left.metadata.num_rows
        if skip < num_rows:
            yield shard, skip
        skip = max(0, skip - num_rows)


def join_shard(rollouts: ShardSet, scores: ShardSet, shard: int, start_row: int = 0) -> Iterator[Joined]:
    """The joined rows of one shard, from `start_row` on."""
    return ((rollout, row[0]) for rollout, row in join_teachers(rollouts, [[scores]], shard, start_row))


def join_teachers(
    rollouts: ShardSet, teachers: Sequence[Sequence[ShardSet]], shard: int, start_row: int = 0
) -> Iterator[tuple[Rollout, list[Score]]]:
    """The same with the scores of several teachers, in their order, each put together of its parts.

    Memory: one row group of each part.
    """
    parts = [scores for teacher in teachers for scores in teacher]
    rights = [(_sized_scores(scores, shard, start_row), scores) for scores in parts]
    is_whole = all(len(teacher) == 1 for teacher in teachers)
    count = start_row
    for rollout, ids_hash in _hashed_rollouts(rollouts, shard, start_row):
        row = [_checked(rollout, ids_hash, next(right, None), scores, shard, count) for right, scores in rights]
        yield rollout, row if is_whole else _whole_scores(row, teachers)
        count += 1
    for right, scores in rights:
        if next(right, None) is not None:
            raise AlignmentError(
                f"{scores.path(shard)}: has more rows than its rollouts ({count}). {_delete_and_run(scores)}"
            )


def _whole_scores(row: Sequence[Score], teachers: Sequence[Sequence[ShardSet]]) -> list[Score]:
    parts = iter(row)
    return [_whole(list(islice(parts, len(teacher)))) for teacher in teachers]


def _whole(parts: Sequence[Score]) -> Score:
    """One score of its parts, or none where one of them is an error: as if all tokens had been scored at once."""
    if len(parts) == 1:
        return parts[0]
    error = next((part.error for part in parts if part.error is not None), None)
    kept = slice(0) if error is not None else slice(None)
    return replace(
        parts[0],
        error=error,
        teacher_logprobs=np.concatenate([part.teacher_logprobs for part in parts])[kept],
        teacher_rank=np.concatenate([part.teacher_rank for part in parts])[kept],
        topk_ids=np.concatenate([part.topk_ids for part in parts])[kept],
        topk_logprobs=np.concatenate([part.topk_logprobs for part in parts])[kept],
    )


def num_scored(num_tokens: int, first_token: int | None, horizon: int | None) -> int:
    """How many of a response's tokens lie from `first_token` (None: 0) up to `horizon` (None: the end)."""
    end = num_tokens if horizon is None else min(num_tokens, horizon)
    return max(0, end - (first_token or 0))


def read_rollouts(rollouts: ShardSet, shard: int, start_row: int = 0) -> Iterator[Rollout]:
    """The rollouts of one shard; ids, lengths and log-probs checked. Raises CorruptShardError."""
    return (rollout for rollout, _ in _hashed_rollouts(rollouts, shard, start_row))


def _hashed_rollouts(rollouts: ShardSet, shard: int, start_row: int) -> Iterator[tuple[Rollout, int]]:
    """read_rollouts, each with its ids_hash."""
    top_k = rollouts.about.get("sampling", {}).get("student_top_k", 0)
    for first, group in row_groups(rollouts, shard, start_row):
        hashes = group.table["ids_hash"].to_pylist()
        is_fit = (
            fits(group, "response_ids", ("sampling_logprobs", "raw_logprobs"), ("reward",))
            and fits(group, "student_topk_ids", ("student_topk_logprobs",))
            and is_even(group, "response_ids", {**dict.fromkeys(STUDENT_TOPK, top_k), "loss_mask": 1})
        )
        for row, rollout in enumerate(rollouts_of(group, top_k), first):
            if row < start_row:
                continue
            # Page checksums leave out page headers, where one flipped bit can shorten a column's last list.
            ids_hash = rollout.ids_hash
            fault = None if is_fit else rollout_fault(rollout, top_k)
            if ids_hash != hashes[row - first]:
                fault = "its token ids do not give its ids_hash"
            if fault:
                raise CorruptShardError(f"{rollouts.path(shard)} row {row}: {fault}. {_delete_and_run(rollouts)}")
            yield rollout, ids_hash


def read_scores(scores: ShardSet, shard: int, start_row: int = 0) -> Iterator[Score]:
    """The scores of one shard, to be checked against their rollouts; their values are. Raises CorruptShardError."""
    return (score for score, _ in _sized_scores(scores, shard, start_row))


def _sized_scores(scores: ShardSet, shard: int, start_row: int) -> Iterator[tuple[Score, int | None]]:
    """read_scores, each with how many response tokens its lists fit; None where that takes a look at the row."""
    top_k = scores.about["top_k"]
    widths = {"teacher_rank": 1, "topk_ids": top_k, "topk_logprobs": top_k}
    is_part = any(scores.about.get(name) is not None for name in ("first_token", "horizon"))
    for first, group in row_groups(scores, shard, start_row):
        is_fit = fits(group, "teacher_logprobs", ("teacher_logprobs",)) and fits(
            group, "topk_logprobs", ("topk_logprobs",)
        )
        has_even_lists = not is_part and is_even(group, "teacher_logprobs", widths)
        for row, score in enumerate(scores_of(group, top_k), first):
            if row < start_row:
                continue
            if not is_fit and (fault := _value_fault(score)):
                raise CorruptShardError(f"{scores.path(shard)} row {row}: {fault}. {_delete_and_run(scores)}")
            yield score, len(score.teacher_logprobs) if has_even_lists else None


def _delete_and_run(shards: ShardSet) -> str:
    return f"Delete the file and its seal and run: {shards.remedy}"


def rollout_fault(rollout: Rollout, top_k: int = 0) -> str | None:
    """What makes a rollout unfit to be stored or learned from: lengths that differ, values that no log-prob or
    reward has. top_k: how many of the student's likeliest tokens it is to hold."""
    for name in ("sampling_logprobs", "raw_logprobs", "loss_mask"):
        values = getattr(rollout, name)
        if values is not None and len(values) != len(rollout.response_ids):
            return f"{name} has {len(values)} values, response_ids has {len(rollout.response_ids)}"
        if values is not None and name != "loss_mask" and (fault := _logprob_fault(values, name)):
            return fault
    for name in ("topk_ids", "topk_logprobs") if top_k else ():
        values = getattr(rollout, name)
        if values is None or values.shape != (len(rollout.response_ids), top_k):
            found = "no" if values is None else values.size
            return f"student_{name} has {found} values, expected {top_k} for each of {len(rollout.response_ids)} response_ids"
    if rollout.topk_logprobs is not None and (fault := _logprob_fault(rollout.topk_logprobs, "student_topk_logprobs")):
        return fault
    if rollout.reward is not None and not math.isfinite(rollout.reward):
        return f"reward is {rollout.reward}; expected a finite number"
    return None


def score_fault(rollout: Rollout, score: Score, about: Mapping[str, Any]) -> str | None:
    """The same for the score of a rollout. `about`: top_k, and first_token and horizon where there are some."""
    return _length_fault(rollout, score, about) or _value_fault(score)


def _length_fault(rollout: Rollout, score: Score, about: Mapping[str, Any]) -> str | None:
    """A score that says why it could not be made holds no lists to compare."""
    if score.error is not None:
        return None
    first, horizon, top_k = about.get("first_token"), about.get("horizon"), about["top_k"]
    num_tokens = num_scored(len(rollout.response_ids), first, horizon)
    reach = "" if first is None and horizon is None else f", of which {num_tokens} are to be scored"
    for name in ("teacher_logprobs", "teacher_rank"):
        if len(getattr(score, name)) != num_tokens:
            return f"{name} has {len(getattr(score, name))} values, response_ids has {len(rollout.response_ids)}{reach}"
    for name in ("topk_ids", "topk_logprobs"):
        if getattr(score, name).shape != (num_tokens, top_k):
            return (
                f"{name} has {getattr(score, name).size} values, expected {top_k} for each of {num_tokens} response_ids"
            )
    return None


def _value_fault(score: Score) -> str | None:
    return _logprob_fault(score.teacher_logprobs, "teacher_logprobs") or _logprob_fault(
        score.topk_logprobs, "topk_logprobs"
    )


def _logprob_fault(values: np.ndarray, name: str) -> str | None:
    # NaN fails every comparison, so this finds NaN as well as positive values.
    if values.size and not values.max() <= 0:
        bad = "NaN" if np.isnan(values).any() else f"{values.max():.6g}"
        return f"{name} holds {bad}; a log-prob is at most 0"
    return None


def _checked(
    rollout: Rollout, ids_hash: int, sized: tuple[Score, int | None] | None, scores: ShardSet, shard: int, row: int
) -> Score:
    """The score, which is this rollout's. Raises AlignmentError."""
    if sized is None:
        raise AlignmentError(
            f"{scores.path(shard)}: ends before row {row}, {rollout.rollout_id}. {_delete_and_run(scores)}"
        )
    score, num_tokens = sized
    if score.rollout_id != rollout.rollout_id or score.ids_hash != ids_hash:
        found = score.rollout_id if score.rollout_id != rollout.rollout_id else "other token ids"
        raise AlignmentError(
            f"{scores.path(shard)} row {row}: scores {found}, expected {rollout.rollout_id}. The scores were made from other rollouts; delete the file and its seal and run: {scores.remedy}"
        )
    fits = num_tokens == len(rollout.response_ids)
    if not fits and (fault := _length_fault(rollout, score, scores.about)):
        raise AlignmentError(f"{scores.path(shard)} row {row}: {fault}. {_delete_and_run(scores)}")
    return score
