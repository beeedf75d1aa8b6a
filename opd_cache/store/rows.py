"""Between Arrow record batches and the dataclasses of the stages. Per-token arrays are views, not copies."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opd_cache import schema
from opd_cache.types import Rollout, Score

ROWS_PER_GROUP = 256
ROWS_PER_GROUP_TOPK = 64


def rollouts_schema(with_raw_logprobs: bool, with_reward: bool) -> pa.Schema:
    chosen = {"raw_logprobs": with_raw_logprobs, "reward": with_reward}
    return schema.arrow_schema(schema.ROLLOUTS, frozenset(name for name, is_chosen in chosen.items() if is_chosen))


def scores_schema(top_k: int) -> pa.Schema:
    return schema.arrow_schema(schema.SCORES, frozenset({"topk_ids", "topk_logprobs"} if top_k else ()))


def group_sizes(num_rows: int, rows_per_prompt: int, limit: int) -> list[int]:
    """Sizes of row groups of at most `limit` rows that never split a prompt's samples (unless one prompt exceeds it)."""
    size = max(rows_per_prompt, limit // rows_per_prompt * rows_per_prompt)
    return [min(size, num_rows - start) for start in range(0, num_rows, size)]


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
    }
    return _record_batch(columns, table_schema)


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
    return _record_batch(columns, table_schema)


def _record_batch(columns: dict[str, Iterable], table_schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        _list_array(list(columns[field.name]), field.type)
        if pa.types.is_list(field.type)
        else pa.array(columns[field.name], field.type)
        for field in table_schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=table_schema)


def _list_array(values: list[npt.NDArray], list_type: pa.DataType) -> pa.ListArray:
    lengths = [len(v) for v in values]
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    dtype = list_type.value_type.to_pandas_dtype()
    flat = np.concatenate(values) if values else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(dtype, copy=False)), type=list_type)


def rollouts_of(table: pa.Table) -> list[Rollout]:
    """The rollouts of one row group."""
    scalars = {
        name: table[name].to_pylist()
        for name in ("rollout_id", "prompt_index", "sample_index", "finish_reason", "policy_version")
    }
    prompt_ids, response_ids = split_lists(table, "prompt_ids"), split_lists(table, "response_ids")
    sampling = split_lists(table, "sampling_logprobs")
    raw = split_lists(table, "raw_logprobs") if "raw_logprobs" in table.column_names else [None] * len(table)
    rewards = table["reward"].to_pylist() if "reward" in table.column_names else [None] * len(table)
    return [
        Rollout(
            rollout_id=scalars["rollout_id"][i],
            prompt_index=scalars["prompt_index"][i],
            sample_index=scalars["sample_index"][i],
            prompt_ids=prompt_ids[i],
            response_ids=response_ids[i],
            sampling_logprobs=sampling[i],
            finish_reason=scalars["finish_reason"][i],
            policy_version=scalars["policy_version"][i],
            raw_logprobs=raw[i],
            reward=rewards[i],
        )
        for i in range(len(table))
    ]


def scores_of(table: pa.Table, top_k: int) -> list[Score]:
    """The scores of one row group."""
    ids, hashes, errors = (table[name].to_pylist() for name in ("rollout_id", "ids_hash", "error"))
    logprobs, ranks = split_lists(table, "teacher_logprobs"), split_lists(table, "teacher_rank")
    has_topk = "topk_ids" in table.column_names
    topk_ids = split_lists(table, "topk_ids") if has_topk else [np.zeros(0, np.int32)] * len(table)
    topk_logprobs = split_lists(table, "topk_logprobs") if has_topk else [np.zeros(0, np.float32)] * len(table)
    return [
        Score(
            rollout_id=ids[i],
            ids_hash=hashes[i],
            teacher_logprobs=logprobs[i],
            teacher_rank=ranks[i],
            topk_ids=_by_token(topk_ids[i], len(logprobs[i]), top_k),
            topk_logprobs=_by_token(topk_logprobs[i], len(logprobs[i]), top_k),
            error=errors[i],
        )
        for i in range(len(table))
    ]


def _by_token(flat: npt.NDArray, num_tokens: int, top_k: int) -> npt.NDArray:
    # A list of another length is left flat: the join refuses it by name.
    return flat.reshape(num_tokens, top_k) if len(flat) == num_tokens * top_k else flat


def split_lists(table: pa.Table, name: str) -> list[npt.NDArray]:
    """Each row's list as a numpy view."""
    offsets, flat = list_offsets(table, name).tolist(), flat_values(table, name)
    return [flat[start:end] for start, end in itertools.pairwise(offsets)]


def list_offsets(table: pa.Table, name: str) -> npt.NDArray:
    """Where each row's list starts in flat_values, and where the last one ends."""
    offsets = _one_chunk(table, name).offsets.to_numpy()
    return offsets - offsets[0]


def flat_values(table: pa.Table, name: str) -> npt.NDArray:
    """All lists of a column, one behind the other, as a view."""
    return _one_chunk(table, name).flatten().to_numpy(zero_copy_only=True)


def _one_chunk(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
