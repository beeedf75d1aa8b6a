"""Rollouts and scores side by side. Aligned shards are zipped, and every row is checked: id, ids hash, lengths, values."""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from opd_cache.errors import AlignmentError, CorruptShardError
from opd_cache.store.rows import rollouts_of, scores_of
from opd_cache.store.shards import ShardSet, read_row_group
from opd_cache.types import Rollout, Score

Joined = tuple[Rollout, Score]


def join_stages(rollouts: ShardSet, scores: ShardSet, start_row: int = 0) -> Iterator[Joined]:
    """Every rollout with its score in planned order, from row `start_row` of the whole stage on.

    Memory: one row group of each side. Raises AlignmentError where a score belongs to another rollout,
    CorruptShardError on damage or impossible values.
    """
    skip = start_row
    for shard in range(rollouts.num_shards):
        with rollouts.open(shard) as left:
            num_rows = left.metadata.num_rows
        if skip >= num_rows:
            skip -= num_rows
            continue
        yield from join_shard(rollouts, scores, shard, skip)
        skip = 0


def join_shard(rollouts: ShardSet, scores: ShardSet, shard: int, start_row: int = 0) -> Iterator[Joined]:
    """The joined rows of one shard, from `start_row` on."""
    where, remedy = scores.path(shard), scores.remedy
    right = read_scores(scores, shard, start_row)
    count = start_row
    for rollout in read_rollouts(rollouts, shard, start_row):
        score = next(right, None)
        if score is None:
            raise AlignmentError(
                f"{where}: ends before row {count}, {rollout.rollout_id}. Delete the file and its seal and run: {remedy}"
            )
        _check_pair(rollout, score, scores, shard, count)
        yield rollout, score
        count += 1
    if next(right, None) is not None:
        raise AlignmentError(
            f"{where}: has more rows than its rollouts ({count}). Delete the file and its seal and run: {remedy}"
        )


def read_rollouts(rollouts: ShardSet, shard: int, start_row: int = 0) -> Iterator[Rollout]:
    """The rollouts of one shard; ids, lengths and log-probs checked. Raises CorruptShardError."""
    for first, table in _row_groups(rollouts, shard, start_row):
        hashes = table["ids_hash"].to_pylist()
        for row, rollout in enumerate(rollouts_of(table), first):
            if row < start_row:
                continue
            # Page checksums leave out page headers, where one flipped bit can shorten a column's last list.
            if rollout.ids_hash != hashes[row - first]:
                raise CorruptShardError(
                    f"{rollouts.path(shard)} row {row}: its token ids do not give its ids_hash. Delete the file and its seal and run: {rollouts.remedy}"
                )
            if fault := rollout_fault(rollout):
                raise CorruptShardError(
                    f"{rollouts.path(shard)} row {row}: {fault}. Delete the file and its seal and run: {rollouts.remedy}"
                )
            yield rollout


def read_scores(scores: ShardSet, shard: int, start_row: int = 0) -> Iterator[Score]:
    """The scores of one shard, to be checked against their rollouts."""
    for first, table in _row_groups(scores, shard, start_row):
        for row, score in enumerate(scores_of(table, scores.about["top_k"]), first):
            if row < start_row:
                continue
            yield score


def _row_groups(shards: ShardSet, shard: int, start_row: int) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first row, table) of each row group with rows from `start_row` on."""
    with shards.open(shard) as file:
        first = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first + num_rows > start_row:
                yield first, read_row_group(file, shards.path(shard), group)
            first += num_rows


def rollout_fault(rollout: Rollout) -> str | None:
    """What makes a rollout unfit to be stored or learned from: lengths that differ, values that no log-prob or
    reward has."""
    for name in ("sampling_logprobs", "raw_logprobs"):
        values = getattr(rollout, name)
        if values is not None and len(values) != len(rollout.response_ids):
            return f"{name} has {len(values)} values, response_ids has {len(rollout.response_ids)}"
        if values is not None and (fault := _logprob_fault(values, name)):
            return fault
    if rollout.reward is not None and not math.isfinite(rollout.reward):
        return f"reward is {rollout.reward}; expected a finite number"
    return None


def score_fault(rollout: Rollout, score: Score, top_k: int) -> str | None:
    """The same for the score of a rollout."""
    return _length_fault(rollout, score, top_k) or _value_fault(score)


def _length_fault(rollout: Rollout, score: Score, top_k: int) -> str | None:
    """A score that says why it could not be made holds no lists to compare."""
    if score.error is not None:
        return None
    num_tokens = len(rollout.response_ids)
    for name in ("teacher_logprobs", "teacher_rank"):
        if len(getattr(score, name)) != num_tokens:
            return f"{name} has {len(getattr(score, name))} values, response_ids has {num_tokens}"
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


def _check_pair(rollout: Rollout, score: Score, scores: ShardSet, shard: int, row: int) -> None:
    where, remedy = f"{scores.path(shard)} row {row}", scores.remedy
    if score.rollout_id != rollout.rollout_id or score.ids_hash != rollout.ids_hash:
        found = score.rollout_id if score.rollout_id != rollout.rollout_id else "other token ids"
        raise AlignmentError(
            f"{where}: scores {found}, expected {rollout.rollout_id}. The scores were made from other rollouts; delete the file and its seal and run: {remedy}"
        )
    if fault := _length_fault(rollout, score, scores.about["top_k"]):
        raise AlignmentError(f"{where}: {fault}. Delete the file and its seal and run: {remedy}")
    if fault := _value_fault(score):
        raise CorruptShardError(f"{where}: {fault}. Delete the file and its seal and run: {remedy}")
