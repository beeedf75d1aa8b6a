"""One shard of rollouts with the scores beside it: digests, checksums, ids, lengths and values, by whole columns."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from opd_cache.errors import AlignmentError, CorruptShardError
from opd_cache.store.arrays import array_of
from opd_cache.store.columns import fits, is_even, row_groups
from opd_cache.store.join import num_scored
from opd_cache.store.plans import RolloutPlan
from opd_cache.store.publish import digest_bytes, digest_file
from opd_cache.store.rows import STUDENT_TOPK, Lists, RowGroup, numbers
from opd_cache.store.shards import ShardSet
from opd_cache.types import hash_ids

LARGEST_IN_MEMORY = 256 << 20  # bytes of a shard, one a core


@dataclass(frozen=True)
class Facts:
    """What rollouts are compared with."""

    plan: RolloutPlan
    # By place in the plan: sample_index of its first rollout; only imports repeat a prompt.
    first_samples: Sequence[int]
    prompt_hashes: npt.NDArray[np.uint64]  # by prompt index: hash_ids of its ids and no response
    vocab_size: int | None  # ids are below it; None where no file says


@dataclass(frozen=True)
class Rows:
    """What a shard's scores are compared with."""

    rollout_ids: pa.Array
    ids_hashes: npt.NDArray[np.uint64]
    num_tokens: npt.NDArray[np.int32]  # of the responses


def hash_prompts(ids: Lists) -> list[int]:
    """hash_ids of each prompt with an empty response."""
    nothing = np.zeros(0, np.int32)
    return [hash_ids(prompt, nothing) for prompt in ids.rows()]


def read_shard(shards: ShardSet, shard: int, seal: dict[str, Any] | None) -> bytes | None:
    """A shard's bytes, compared with its seal: what is decoded is what was hashed, and is read once. None of a shard that
    is too large for that. Raises CorruptShardError."""
    path = shards.path(shard)
    data = path.read_bytes() if path.stat().st_size <= LARGEST_IN_MEMORY else None
    if seal is None:
        return data
    wanted = seal["shards"][shard]["sha256"]
    if (digest := digest_file(path) if data is None else digest_bytes(data)) != wanted:
        raise CorruptShardError(f"{path}: its sha256 is {digest[:12]}…, {shards.seal_path.name} says {wanted[:12]}…")
    return data


def check_rollouts(shards: ShardSet, shard: int, facts: Facts, data: bytes | None) -> Rows:
    """Compare every row of a shard with the plan, the prompts and itself.

    Memory: one row group. Raises CorruptShardError, MismatchError.
    """
    with shards.open(shard, data) as file:
        end = file.metadata.num_rows
    if end != facts.plan.shard_rollouts(shard):
        raise CorruptShardError(f"{shards.path(shard)}: {end} rows, the plan has {facts.plan.shard_rollouts(shard)}")
    expected = _planned_ids(facts, shard)
    hashes, counts = [], []
    for first, group in row_groups(shards, shard, 0, data):
        end = first + len(group.table)
        fault = _rollouts_fault(group, facts, expected[first:end])
        if fault is not None:
            raise CorruptShardError(f"{shards.path(shard)} rows {first} to {end - 1}: {fault}")
        hashes.append(numbers(group.table["ids_hash"]))
        counts.append(numbers(group.table["num_response_tokens"]))
    return Rows(expected, np.concatenate(hashes), np.concatenate(counts))


def first_samples(plan: RolloutPlan) -> list[int]:
    """How many rollouts of its prompt come before each place of a plan."""
    if len(set(plan.prompt_indices)) == len(plan.prompt_indices):
        return [0] * len(plan.prompt_indices)
    seen: Counter[int] = Counter()
    firsts = []
    for prompt in plan.prompt_indices:
        firsts.append(seen[prompt])
        seen[prompt] += plan.n_samples_per_prompt
    return firsts


def _planned_ids(facts: Facts, shard: int) -> pa.Array:
    plan, size = facts.plan, facts.plan.prompts_per_shard
    firsts = facts.first_samples[shard * size : (shard + 1) * size]
    heads = (f"{plan.scope}/{prompt}/" for prompt in plan.shard_prompts(shard))
    samples = {first: [str(first + sample) for sample in range(plan.n_samples_per_prompt)] for first in {*firsts}}
    return array_of(
        [head + sample for head, first in zip(heads, firsts, strict=True) for sample in samples[first]], pa.string()
    )


def _rollouts_fault(group: RowGroup, facts: Facts, expected: pa.Array) -> str | None:
    table, lists, plan = group.table, group.lists, facts.plan
    if len(expected) != len(table):
        return f"{len(table)} rows, of which the plan has {len(expected)}"
    if not table["rollout_id"].combine_chunks().equals(expected):
        return "its rollout_ids are not those of the plan, in their order"
    for ids in ("prompt_ids", "response_ids"):
        if not np.array_equal(np.diff(lists[ids].offsets), numbers(table[f"num_{ids.removesuffix('ids')}tokens"])):
            return f"lists of {ids} do not have the lengths that are said beside them"
    if not fits(group, "response_ids", ("sampling_logprobs", "raw_logprobs"), ("reward",)) or not fits(
        group, "student_topk_ids", ("student_topk_logprobs",)
    ):
        return "log-probs or rewards that none can be (NaN, above 0, or not one for each id)"
    if not is_even(group, "response_ids", dict.fromkeys(STUDENT_TOPK, plan.sampling.student_top_k)):
        return "student_topk lists of another length than the plan's"
    if "loss_mask" in lists and not is_even(group, "response_ids", {"loss_mask": 1}):
        return "loss_mask does not have one entry for each response id"
    for name in ("prompt_ids", "response_ids", "student_topk_ids"):
        if name in lists and (fault := _ids_fault(lists[name].values, name, facts.vocab_size)):
            return fault
    if (numbers(table["policy_version"]) != plan.policy_version).any():
        return f"policy_version is not the plan's, {plan.policy_version}"
    return _hashes_fault(group, facts.prompt_hashes)


def _ids_fault(values: npt.NDArray, name: str, vocab_size: int | None) -> str | None:
    if not values.size:
        return None
    low, high = int(values.min()), int(values.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        return f"{name} holds id {low if low < 0 else high}, the vocabulary has {vocab_size or 'ids from 0 on'}"
    return None


def _hashes_fault(group: RowGroup, prompt_hashes: npt.NDArray[np.uint64]) -> str | None:
    """Compare every row's ids with its ids_hash, and its prompt with prompts.parquet."""
    table, prompts, responses = group.table, group.lists["prompt_ids"], group.lists["response_ids"]
    found, known, last = [], [], None
    for prompt, response in zip(map(bytes, _byte_rows(prompts)), _byte_rows(responses), strict=True):
        if prompt != last:  # the samples of a prompt are neighbours
            begun = xxhash.xxh3_64((len(prompt) // 4).to_bytes(8, "little") + prompt)
            digest, last = begun.intdigest(), prompt
        known.append(digest)
        whole = begun.copy()
        whole.update(response)
        found.append(whole.intdigest())
    indices = numbers(table["prompt_index"])
    if not np.array_equal(np.array(found, np.uint64), numbers(table["ids_hash"])):
        return "token ids do not give their ids_hash"
    if indices.min() < 0 or indices.max() >= len(prompt_hashes):
        return f"prompt_index {indices.max()}, there are {len(prompt_hashes)} prompts"
    if not np.array_equal(np.array(known, np.uint64), prompt_hashes[indices]):
        return "prompt_ids are not those of the prompts file"
    return None


def _byte_rows(ids: Lists) -> Iterator[memoryview]:
    data = ids.values.astype("<i4", copy=False).view(np.uint8).data
    ends = (ids.offsets * 4).tolist()
    return (data[start:end] for start, end in itertools.pairwise(ends))


def check_scores(scores: ShardSet, shard: int, rows: Rows, vocab_size: int | None, data: bytes | None) -> None:
    """Compare every row of a shard of scores with its rollout.

    Memory: one row group. Raises CorruptShardError, AlignmentError, MismatchError.
    """
    end = 0
    for first, group in row_groups(scores, shard, 0, data):
        end = first + len(group.table)
        mine = slice(first, end)
        part = Rows(rows.rollout_ids[mine], rows.ids_hashes[mine], rows.num_tokens[mine])
        place = f"{scores.path(shard)} rows {first} to {end - 1}"
        if fault := _alignment_fault(group, part):
            raise AlignmentError(f"{place}: {fault}")
        if fault := _scores_fault(group, scores.about, part.num_tokens, vocab_size):
            raise CorruptShardError(f"{place}: {fault}")
    if end != len(rows.rollout_ids):
        raise AlignmentError(f"{scores.path(shard)}: {end} rows, its rollouts have {len(rows.rollout_ids)}")


def _alignment_fault(group: RowGroup, rows: Rows) -> str | None:
    if not group.table["rollout_id"].combine_chunks().equals(rows.rollout_ids):
        return "rollout_ids are not those of the rollouts beside them"
    if not np.array_equal(numbers(group.table["ids_hash"]), rows.ids_hashes):
        return "made from other token ids (ids_hash)"
    return None


def _scores_fault(
    group: RowGroup, about: dict[str, Any], num_tokens: npt.NDArray[np.int32], vocab_size: int | None
) -> str | None:
    table, lists, top_k = group.table, group.lists, about["top_k"]
    first, horizon = about.get("first_token"), about.get("horizon")
    counts = num_tokens.copy()
    if first is not None or horizon is not None:
        counts[:] = [num_scored(count, first, horizon) for count in num_tokens.tolist()]
    if table["error"].null_count < len(table):
        counts[~table["error"].is_null().to_numpy()] = 0
    lengths = numbers(table["num_response_tokens"])
    if not np.array_equal(lengths, counts) or not np.array_equal(np.diff(lists["teacher_logprobs"].offsets), counts):
        return "not one log-prob for each response token that is to be scored"
    if not is_even(group, "teacher_logprobs", {"teacher_rank": 1, "topk_ids": top_k, "topk_logprobs": top_k}):
        return "teacher_rank or top-k lists of another length than the plan's"
    if not fits(group, "teacher_logprobs", ("teacher_logprobs",)) or not fits(
        group, "topk_logprobs", ("topk_logprobs",)
    ):
        return "log-probs that none can be (NaN or above 0)"
    ranks = lists["teacher_rank"].values
    if ranks.size and ranks.min() < 0:
        return f"teacher_rank holds {ranks.min()}; a rank is at least 1, or 0 for unknown"
    if "topk_ids" in lists:
        return _ids_fault(lists["topk_ids"].values, "topk_ids", vocab_size)
    return None
