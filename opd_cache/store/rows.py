"""Between Arrow record batches and the dataclasses of the stages. Per-token arrays are views, not copies."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opd_cache import schema
from opd_cache.errors import CorruptShardError
from opd_cache.store.arrays import record_batch
from opd_cache.types import Rollout, Score

# Pages of some hundred thousand values compress a tenth better than those of a fourth, and are read in half the time.
ROWS_PER_GROUP = 1024
STUDENT_TOPK = ("student_topk_ids", "student_topk_logprobs")
VALUES_PER_GROUP = 1 << 22  # per column, at full length: 64 responses of 1024 tokens with a top k of 64


def rollouts_schema(with_raw_logprobs: bool, with_reward: bool, with_topk: bool = False) -> pa.Schema:
    chosen = {"raw_logprobs": with_raw_logprobs, "reward": with_reward, **dict.fromkeys(STUDENT_TOPK, with_topk)}
    return imported_schema(["sampling_logprobs", *(name for name, is_chosen in chosen.items() if is_chosen)])


def imported_schema(columns: Iterable[str]) -> pa.Schema:
    """Of rollouts with these of the optional columns."""
    return schema.arrow_schema(schema.ROLLOUTS, frozenset(columns))


def scores_schema(top_k: int) -> pa.Schema:
    return schema.arrow_schema(schema.SCORES, frozenset({"topk_ids", "topk_logprobs"} if top_k else ()))


def group_sizes(num_rows: int, rows_per_prompt: int, limit: int) -> list[int]:
    """Sizes of row groups of at most `limit` rows that never split a prompt's samples (unless one prompt exceeds it)."""
    size = max(rows_per_prompt, limit // rows_per_prompt * rows_per_prompt)
    return [min(size, num_rows - start) for start in range(0, num_rows, size)]


def group_limit(values_per_row: int) -> int:
    """Rows of a row group whose longest column holds at most this many values a row."""
    return max(1, min(ROWS_PER_GROUP, VALUES_PER_GROUP // max(values_per_row, 1)))


def rollout_batch(rows: Sequence[Rollout], table_schema: pa.Schema) -> pa.RecordBatch:
    """Rollouts as one record batch."""
    columns: dict[str, Iterable] = {
        "rollout_id": [r.rollout_id for r in rows],
        "prompt_index": [r.prompt_index for r in rows],
        "sample_index": [r.sample_index for r in rows],
        "num_prompt_tokens": [len(r.prompt_ids) for r in rows],
        "num_response_tokens": [len(r.response_ids) for r in rows],
        "finish_reason": [r.finish_reason for r in rows],
        "policy_version": [r.policy_version for r in rows],
        "ids_hash": np.array([r.ids_hash for r in rows], dtype=np.uint64),
        "prompt_ids": [r.prompt_ids for r in rows],
        "response_ids": [r.response_ids for r in rows],
        "sampling_logprobs": [r.sampling_logprobs for r in rows],
        "raw_logprobs": [r.raw_logprobs for r in rows],
        "reward": [r.reward for r in rows],
        "student_topk_ids": [_flat(r.topk_ids) for r in rows],
        "student_topk_logprobs": [_flat(r.topk_logprobs) for r in rows],
        "loss_mask": [r.loss_mask for r in rows],
    }
    return record_batch(columns, table_schema)


def score_batch(rows: Sequence[Score], table_schema: pa.Schema) -> pa.RecordBatch:
    """Scores as one record batch."""
    columns: dict[str, Iterable] = {
        "rollout_id": [s.rollout_id for s in rows],
        "num_response_tokens": [len(s.teacher_logprobs) for s in rows],
        "ids_hash": np.array([s.ids_hash for s in rows], dtype=np.uint64),
        "error": [s.error for s in rows],
        "teacher_logprobs": [s.teacher_logprobs for s in rows],
        "teacher_rank": [s.teacher_rank for s in rows],
        "topk_ids": [s.topk_ids.reshape(-1) for s in rows],
        "topk_logprobs": [s.topk_logprobs.reshape(-1) for s in rows],
    }
    return record_batch(columns, table_schema)


def _flat(values_RK: npt.NDArray | None) -> npt.NDArray | None:
    return None if values_RK is None else values_RK.reshape(-1)


@dataclass(frozen=True, slots=True)
class Lists:
    """A list column of one row group."""

    values: npt.NDArray  # of all rows, one behind the other; a view
    offsets: npt.NDArray  # [rows + 1], where each row starts in values

    def rows(self) -> list[npt.NDArray]:
        """Each row's list as a view."""
        return _split(self.values, self.offsets)

    def rows_by_token(self, tokens: npt.NDArray, width: int) -> list[npt.NDArray]:
        """Each row's [R, width], its R tokens from `tokens`, offsets of a per-token column. A list of another length
        stays flat: the join refuses it by name."""
        if np.array_equal(self.offsets, tokens * width):
            return _split(self.values.reshape(-1, width), tokens)
        counts = np.diff(tokens).tolist()
        return [
            flat.reshape(count, width) if len(flat) == count * width else flat
            for flat, count in zip(self.rows(), counts, strict=True)
        ]


def _split(values: npt.NDArray, offsets: npt.NDArray) -> list[npt.NDArray]:
    return [values[start:end] for start, end in itertools.pairwise(offsets.tolist())]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A table of one row group with its list columns at hand: pyarrow takes some 20 us to give one."""

    table: pa.Table
    lists: dict[str, Lists]


def row_group(table: pa.Table) -> RowGroup:
    return RowGroup(
        table, {field.name: _lists_of(table[field.name]) for field in table.schema if pa.types.is_list(field.type)}
    )


def numbers(column: pa.ChunkedArray) -> npt.NDArray:
    """A column of numbers as a view. Raises CorruptShardError where some are null.

    Arrow's own to_numpy imports pandas, 0.2 s where that is installed.
    """
    return _numpy(_chunk(column))


def _numpy(values: pa.Array) -> npt.NDArray:
    if values.null_count:
        raise CorruptShardError(f"{values.null_count} of {len(values)} numbers are null")
    return np.from_dlpack(values)


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists_of(column: pa.ChunkedArray) -> Lists:
    chunk = _chunk(column)
    offsets = _numpy(chunk.offsets)
    values = chunk.values.slice(offsets[0], offsets[-1] - offsets[0])
    if pa.types.is_boolean(values.type):  # which Arrow packs into bits
        return Lists(values.to_numpy(zero_copy_only=False), offsets - offsets[0])
    return Lists(_numpy(values), offsets - offsets[0])


def split_lists(table: pa.Table, name: str) -> list[npt.NDArray]:
    """Each row's list as a numpy view."""
    return _lists_of(table[name]).rows()


def rollouts_of(group: RowGroup, top_k: int = 0) -> list[Rollout]:
    """The rollouts of one row group. top_k: of the student's likeliest tokens in it."""
    table, lists = group.table, group.lists
    absent = [None] * len(table)
    columns = zip(
        *(table[name].to_pylist() for name in ("rollout_id", "prompt_index", "sample_index")),
        *(lists[name].rows() for name in ("prompt_ids", "response_ids")),
        lists["sampling_logprobs"].rows() if "sampling_logprobs" in lists else absent,
        *(table[name].to_pylist() for name in ("finish_reason", "policy_version")),
        lists["raw_logprobs"].rows() if "raw_logprobs" in lists else absent,
        table["reward"].to_pylist() if "reward" in table.column_names else absent,
        *(
            lists[name].rows_by_token(lists["response_ids"].offsets, top_k) if name in lists else absent
            for name in STUDENT_TOPK
        ),
        lists["loss_mask"].rows() if "loss_mask" in lists else absent,
        strict=True,
    )
    return [Rollout(*row) for row in columns]


def scores_of(group: RowGroup, top_k: int) -> list[Score]:
    """The scores of one row group."""
    table, lists = group.table, group.lists
    tokens = lists["teacher_logprobs"].offsets
    if "topk_ids" in lists:
        topk = [lists[name].rows_by_token(tokens, top_k) for name in ("topk_ids", "topk_logprobs")]
    else:
        topk = [_split(np.zeros((tokens[-1], 0), dtype), tokens) for dtype in (np.int32, np.float32)]
    columns = zip(
        *(table[name].to_pylist() for name in ("rollout_id", "ids_hash")),
        *(lists[name].rows() for name in ("teacher_logprobs", "teacher_rank")),
        *topk,
        table["error"].to_pylist(),
        strict=True,
    )
    return [Score(*row) for row in columns]
