"""Shards: written as measured, listed when missing, sealed once, and never read when damaged or misplaced."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_helpers import (
    ROLLOUT_COMMAND,
    file_names,
    make_rollouts,
    make_scores,
    publish_rollouts,
    publish_scores,
    rollout_set,
    same_rows,
    score_set,
)
from worker_client import Worker

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError
from opd_cache.run_dir import SEAL
from opd_cache.store.join import join_shard, read_rollouts, read_scores
from opd_cache.store.publish import digest_file, temporary_beside
from opd_cache.store.rows import group_limit, group_sizes
from opd_cache.store.shards import ShardSet
from opd_cache.types import Rollout, Score

# Another file's place


def test_missing_lists_exactly_the_missing(tmp_path):
    shards = rollout_set(tmp_path, num_shards=5)
    assert shards.missing() == [0, 1, 2, 3, 4]
    for shard in (3, 0):
        publish_rollouts(shards, shard, make_rollouts(2))
    assert shards.missing() == [1, 2, 4]
    for shard in (1, 2, 4):
        publish_rollouts(shards, shard, make_rollouts(2))
    assert shards.missing() == []


def test_shard_numbers_beyond_five_digits_are_listed(tmp_path):
    shards = rollout_set(tmp_path, num_shards=100_001)
    publish_rollouts(shards, 100_000, make_rollouts(2))
    assert shards.missing() == list(range(100_000))
    assert len(list(read_rollouts(shards, 100_000))) == 2


def test_shard_of_another_array_is_missing(tmp_path):
    publish_rollouts(rollout_set(tmp_path, num_shards=3), 0, make_rollouts(2))
    assert rollout_set(tmp_path, num_shards=2).missing() == [0, 1]


def test_missing_shard_is_named_when_opened(tmp_path):
    with pytest.raises(MissingInputError, match=r"shard-00001-of-00002\.parquet: no such file"):
        rollout_set(tmp_path, num_shards=2).open(1)


def test_shard_under_the_name_of_another_is_refused(tmp_path):
    shards = rollout_set(tmp_path, num_shards=2)
    publish_rollouts(shards, 0, make_rollouts(4))
    shutil.copy(shards.path(0), shards.path(1))
    assert len(list(read_rollouts(shards, 0))) == 4
    with pytest.raises(MismatchError) as caught:
        shards.open(1)
    assert f"{shards.path(1)}: its footer says shard = 0, expected 1" in str(caught.value)
    assert str(caught.value).endswith(ROLLOUT_COMMAND)


@pytest.mark.parametrize(
    ("other", "found"), [({"run_id": "run-b"}, "run_id = 'run-b'"), ({"plan": "plan-b"}, "plan = 'plan-b'")]
)
def test_shard_of_another_run_or_plan_is_refused(tmp_path, other, found):
    theirs, ours = rollout_set(tmp_path / "theirs", **other), rollout_set(tmp_path / "ours")
    publish_rollouts(theirs, 0, make_rollouts(4))
    publish_rollouts(ours, 0, make_rollouts(4))
    shutil.copy(theirs.path(0), ours.path(0))
    with pytest.raises(MismatchError, match=found):
        ours.open(0)
    with pytest.raises(MismatchError, match=found):
        ours.seal()
    assert not ours.is_sealed()


def test_score_shard_in_place_of_a_rollout_shard_is_refused(tmp_path):
    rollouts, scores = rollout_set(tmp_path), score_set(tmp_path)
    publish_rollouts(rollouts, 0, make_rollouts(4))
    publish_scores(scores, 0, make_scores(make_rollouts(4)))
    shutil.copy(scores.path(0), rollouts.path(0))
    with pytest.raises(MismatchError, match="stage = 'score', expected 'rollout'"):
        rollouts.open(0)


def test_parquet_file_of_another_writer_is_refused(tmp_path):
    shards = rollout_set(tmp_path)
    shards.folder.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), shards.path(0))
    with pytest.raises(CorruptShardError, match="not written by opd-cache"):
        shards.open(0)


# Seals


def sealed_set(run: Path) -> ShardSet:
    shards = rollout_set(run, num_shards=3)
    for shard in range(3):
        publish_rollouts(shards, shard, make_rollouts(6 + shard, seed=shard))
    assert shards.seal()
    return shards


def test_seal_describes_every_shard(tmp_path):
    shards = sealed_set(tmp_path)
    seal = json.loads(shards.seal_path.read_bytes())
    for shard, entry in enumerate(seal["shards"]):
        rows = list(read_rollouts(shards, shard))
        assert entry == {
            "file": shards.path(shard).name,
            "rows": len(rows),
            "tokens": sum(len(row.response_ids) for row in rows),
            "bytes": shards.path(shard).stat().st_size,
            "sha256": digest_file(shards.path(shard)),
        }
    assert seal["rows"] == 6 + 7 + 8
    for name in ("tokens", "bytes"):
        assert seal[name] == sum(entry[name] for entry in seal["shards"])
    assert shards.about.items() <= seal.items()
    assert shards.open_seal() == digest_file(shards.seal_path)


def test_incomplete_stage_is_not_sealed(tmp_path):
    shards = rollout_set(tmp_path, num_shards=2)
    publish_rollouts(shards, 1, make_rollouts(2))
    assert not shards.seal()
    assert file_names(shards.folder) == [shards.path(1).name]


def test_unsealed_stage_is_refused_with_its_count_and_the_command(tmp_path):
    shards = rollout_set(tmp_path, num_shards=3)
    publish_rollouts(shards, 1, make_rollouts(2))
    with pytest.raises(MissingInputError) as caught:
        shards.open_seal()
    assert str(caught.value) == f"{shards.folder}: 1 of 3 shards are there and no {SEAL}. Run: {ROLLOUT_COMMAND}"


def test_deleted_shard_is_named_behind_its_seal(tmp_path):
    shards = sealed_set(tmp_path)
    shards.path(1).unlink()
    with pytest.raises(CorruptShardError) as caught:
        shards.open_seal()
    assert str(caught.value).startswith(f"{shards.path(1)}: missing, the seal says ")
    assert str(caught.value).endswith(ROLLOUT_COMMAND)


def test_shard_of_another_size_is_named_behind_its_seal(tmp_path):
    shards = sealed_set(tmp_path)
    size = shards.path(2).stat().st_size
    with open(shards.path(2), "ab") as file:
        file.write(b"x")
    with pytest.raises(
        CorruptShardError, match=rf"00002-of-00003\.parquet: {size + 1} bytes, the seal says {size} bytes"
    ):
        shards.open_seal()


@pytest.mark.parametrize("key", ["run_id", "plan", "stage", "scope", "policy_version"])
def test_seal_made_from_other_inputs_is_refused(tmp_path, key):
    shards = sealed_set(tmp_path)
    other = replace(shards, about={**shards.about, key: "other"})
    with pytest.raises(MismatchError, match=rf"{SEAL}: made with {key} = .*, now 'other'.*Run|run: "):
        other.open_seal()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema_version": 1', b"[]"])
def test_damaged_seal_is_refused(tmp_path, content):
    shards = sealed_set(tmp_path)
    shards.seal_path.write_bytes(content)
    with pytest.raises((CorruptShardError, MismatchError), match=SEAL):
        shards.open_seal()


@pytest.mark.parametrize("cut", [1, 2])
def test_seal_that_lists_fewer_shards_is_refused(tmp_path, cut):
    shards = sealed_set(tmp_path)
    seal = json.loads(shards.seal_path.read_bytes())
    shards.seal_path.write_text(json.dumps({**seal, "shards": seal["shards"][:-cut]}))
    with pytest.raises((CorruptShardError, MismatchError), match=SEAL):
        shards.open_seal()


def test_seal_cannot_be_replaced_by_a_second_one(tmp_path):
    shards = sealed_set(tmp_path)
    before = shards.seal_path.read_bytes()
    assert shards.seal()
    assert shards.seal_path.read_bytes() == before


def test_processes_that_seal_at_once_agree(worker: Worker, tmp_path):
    seals = set()
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        assert worker.run("seal_two_shards", folder).status == 0
        shards = rollout_set(folder, num_shards=2)
        shards.seal_path.unlink()
        assert {tuple(ended) for ended in worker.race("seal_only", folder, 4)} == {(0, "true")}
        assert file_names(shards.folder) == [SEAL, shards.path(0).name, shards.path(1).name]
        seals.add(shards.seal_path.read_bytes())
        shards.open_seal()
    assert len(seals) == 1


def test_temporary_file_is_never_counted_nor_read(tmp_path):
    whole = sealed_set(tmp_path / "whole")
    shards = rollout_set(tmp_path / "run", num_shards=3)
    for shard in (0, 1):
        publish_rollouts(shards, shard, make_rollouts(6 + shard, seed=shard))
    left_behind = temporary_beside(shards.path(2))
    shutil.copy(whole.path(2), left_behind)
    assert left_behind.suffix != ".parquet"
    assert shards.missing() == [2]
    assert not shards.seal()
    publish_rollouts(shards, 2, make_rollouts(8, seed=2))
    assert shards.seal()
    assert shards.seal_path.read_bytes() == whole.seal_path.read_bytes()
    assert left_behind.exists()


# Encoding


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_wide_leaves_are_byte_stream_split_without_dictionary(tmp_path, stage):
    rows = make_rollouts(150)
    rollouts, scores = rollout_set(tmp_path), score_set(tmp_path)
    publish_rollouts(rollouts, 0, rows, rows_per_group=64)
    publish_scores(scores, 0, make_scores(rows))
    with pq.ParquetFile((rollouts if stage == "rollout" else scores).path(0)) as parquet:
        chunks = [
            parquet.metadata.row_group(group).column(index)
            for group in range(parquet.num_row_groups)
            for index in range(parquet.metadata.num_columns)
        ]
    assert {chunk.physical_type for chunk in chunks} == {"INT32", "INT64", "FLOAT", "BYTE_ARRAY"}
    for chunk in chunks:
        assert chunk.compression == "ZSTD"
        assert chunk.has_offset_index
        if chunk.physical_type in ("INT32", "FLOAT"):
            assert "BYTE_STREAM_SPLIT" in chunk.encodings, chunk.path_in_schema
            assert not chunk.has_dictionary_page


def test_response_token_costs_at_most_five_bytes(tmp_path):
    shards = rollout_set(tmp_path)
    rows = make_rollouts(2000, seed=8, mean_length=100)
    publish_rollouts(shards, 0, rows)
    with pq.ParquetFile(shards.path(0)) as parquet:
        assert parquet.num_row_groups == 8
        total = sum(
            parquet.metadata.row_group(group).column(index).total_compressed_size
            for group in range(parquet.num_row_groups)
            for index in range(parquet.metadata.num_columns)
            if parquet.metadata.row_group(group).column(index).path_in_schema.split(".")[0]
            in ("response_ids", "sampling_logprobs")
        )
    assert total / sum(len(row.response_ids) for row in rows) <= 5


def test_the_longer_its_rows_the_fewer_a_row_group_holds():
    limits = [
        group_limit(tokens * top_k) for tokens, top_k in ((16, 1), (1024, 1), (1024, 64), (16_384, 64), (10**9, 1))
    ]
    assert limits == [1024, 1024, 64, 4, 1]


def test_row_groups_never_split_a_prompt():
    assert group_sizes(10, 2, 5) == [4, 4, 2]
    assert group_sizes(10, 8, 4) == [8, 2]
    assert group_sizes(0, 2, 4) == []


def test_same_rows_give_the_same_bytes(tmp_path):
    for name in "ab":
        publish_rollouts(rollout_set(tmp_path / name), 0, make_rollouts(300))
    gc.collect()
    assert rollout_set(tmp_path / "a").path(0).read_bytes() == rollout_set(tmp_path / "b").path(0).read_bytes()


# Round trips

ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(max_value=0, allow_nan=False, width=32)
rewards = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def rollouts(draw: st.DrawFn, raw_logprobs: bool, reward: bool) -> list[Rollout]:
    rows = []
    for index in range(draw(st.integers(0, 7))):
        length = draw(st.integers(0, 9))

        def values(elements: st.SearchStrategy, dtype: type, length: int = length) -> np.ndarray:
            return np.array(draw(st.lists(elements, min_size=length, max_size=length)), dtype)

        rows.append(
            Rollout(
                rollout_id=f"{draw(st.text(max_size=3).filter(str.isprintable))}/{index}",
                prompt_index=draw(ids),
                sample_index=draw(ids),
                prompt_ids=np.array(draw(st.lists(ids, min_size=1, max_size=4)), np.int32),
                response_ids=values(ids, np.int32),
                sampling_logprobs=values(logprobs, np.float32),
                finish_reason=draw(st.sampled_from(["stop", "length"])),
                policy_version=draw(ids),
                raw_logprobs=values(logprobs, np.float32) if raw_logprobs else None,
                reward=draw(rewards) if reward else None,
            )
        )
    return rows


@st.composite
def scores(draw: st.DrawFn, of: list[Rollout], top_k: int) -> list[Score]:
    rows = []
    for rollout in of:
        error = draw(st.sampled_from([None, None, "does not fit", ""]))
        length = 0 if error is not None else len(rollout.response_ids)

        def values(elements: st.SearchStrategy, dtype: type, count: int) -> np.ndarray:
            return np.array(draw(st.lists(elements, min_size=count, max_size=count)), dtype)

        rows.append(
            Score(
                rollout_id=rollout.rollout_id,
                ids_hash=rollout.ids_hash,
                teacher_logprobs=values(logprobs, np.float32, length),
                teacher_rank=values(ids, np.int32, length),
                topk_ids=values(ids, np.int32, length * top_k).reshape(length, top_k),
                topk_logprobs=values(logprobs, np.float32, length * top_k).reshape(length, top_k),
                error=error,
            )
        )
    return rows


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    data=st.data(),
    raw_logprobs=st.booleans(),
    reward=st.booleans(),
    top_k=st.integers(0, 3),
    rows_per_group=st.integers(1, 5),
)
def test_rows_come_back_as_they_were_written(tmp_path_factory, data, raw_logprobs, reward, top_k, rows_per_group):
    run = tmp_path_factory.mktemp("round_trip")
    written = data.draw(rollouts(raw_logprobs, reward))
    written_scores = data.draw(scores(written, top_k))
    left, right = rollout_set(run, raw_logprobs=raw_logprobs, reward=reward), score_set(run, top_k=top_k)
    publish_rollouts(left, 0, written, rows_per_group)
    publish_scores(right, 0, written_scores, rows_per_group)
    assert same_rows(list(read_rollouts(left, 0)), written)
    assert same_rows(list(read_scores(right, 0)), written_scores)
    joined = list(join_shard(left, right, 0))
    assert same_rows([rollout for rollout, _ in joined], written)
    assert same_rows([score for _, score in joined], written_scores)
