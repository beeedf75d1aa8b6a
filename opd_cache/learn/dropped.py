"""Rows that a recipe leaves out of the loss by an SQL condition: marked, never removed, so that every count stays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from opd_cache.learn.teachers import Teaching
from opd_cache.prompts.intake import read_prompt_table
from opd_cache.store.arrays import array_of
from opd_cache.store.join import Joined
from opd_cache.store.rows import ROWS_PER_GROUP, rollout_batch, score_batch, scores_schema
from opd_cache.store.shards import ShardSet, open_parquet, read_row_groups
from opd_cache.types import Rollout, Score

# (tables r, s and p; which row of r each row of s belongs to) → whether each row of r is dropped
Condition = Callable[[dict[str, pa.Table], list[int]], list[bool]]
SCORES = scores_schema(top_k=1).append(pa.field("teacher", pa.string()))


def drop_condition(sql: str, rollouts: ShardSet, prompts: Path) -> Condition:
    """learn.drop_where over rows of these rollouts and prompts. Raises ConfigError where it is no such condition."""
    from opd_cache.store.query import RowCondition  # only learning with a condition loads DuckDB

    with open_parquet(prompts) as file:
        return RowCondition(sql, "learn.drop_where", {"r": rollouts.schema, "s": SCORES, "p": file.schema_arrow})


def marked_rows(
    rows: Iterator[tuple[Rollout, Sequence[Score]]],
    teaching: Teaching,
    condition: Condition,
    rollouts: ShardSet,
    shard: int,
    prompts: Path,
) -> Iterator[Joined]:
    """The rows of a shard, each with its combined score, which says whether the condition holds.

    Memory: the shard's prompts and a row group of rows. Of several scores, one for which it holds is enough.
    """
    indices = [
        index
        for table in read_row_groups(rollouts.path(shard), ["prompt_index"])
        for index in table["prompt_index"].to_pylist()
    ]
    shard_prompts = read_prompt_table(prompts, indices)
    while window := list(islice(rows, ROWS_PER_GROUP)):
        kept = [(rollout, [(place, scores[place]) for place in teaching.needed(rollout)]) for rollout, scores in window]
        tables = {
            "r": pa.Table.from_batches([rollout_batch([rollout for rollout, _ in window], rollouts.schema)]),
            "s": _score_table([pair for _, pairs in kept for pair in pairs], teaching.names),
            "p": shard_prompts,
        }
        scores_of = [row for row, (_, pairs) in enumerate(kept) for _ in pairs]
        for (rollout, scores), is_dropped in zip(window, condition(tables, scores_of), strict=True):
            yield rollout, replace(teaching.combine(rollout, scores), is_dropped=is_dropped)


def _score_table(scores: Sequence[tuple[int, Score]], names: Sequence[str]) -> pa.Table:
    batch = score_batch([score for _, score in scores], scores_schema(top_k=1))
    teachers = array_of([names[place] for place, _ in scores], pa.string())
    return pa.Table.from_batches([batch]).append_column(SCORES.field("teacher"), teachers)
