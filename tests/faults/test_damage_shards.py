"""Shards and JSON files with cut ends and flipped bits are never read as other data."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import CUT, FLIP_LARGE, FLIP_SMALL, FLIP_WEIGHTS, assert_found, drawn, flipped, link_copy, replaced
from damaged_shard import MISREAD, REFUSED, DamagedShard, raw_outcomes
from fault_log import FaultLog, SilentError, is_full
from oracle import published
from store_helpers import make_rollouts, publish_rollouts, rollout_set
from trials import every_fault

from opd_cache.errors import CorruptShardError, MismatchError
from opd_cache.learn.checkpoint import read_state
from opd_cache.store.join import read_rollouts
from opd_cache.store.manifest import check_files
from opd_cache.store.publish import read_json
from opd_cache.store.shards import FOOTER_KEY


def test_a_shard_cut_at_any_length_is_refused(faults: FaultLog, tmp_path: Path) -> None:
    shards = rollout_set(tmp_path)
    publish_rollouts(shards, 0, make_rollouts(5))
    path, whole = shards.path(0), shards.path(0).read_bytes()
    assert len(whole) < 5000
    with every_fault(faults, CUT) as trial:
        for length in range(0, len(whole), 1 if is_full() else 9):
            path.write_bytes(whole[:length])
            with (
                trial(f"rollout shard, {length} of {len(whole)} bytes"),
                pytest.raises((CorruptShardError, MismatchError), match=r"shard-00000-of-00001\.parquet: ") as caught,
            ):
                list(read_rollouts(shards, 0))
            assert "\n" not in str(caught.value)


def count_outcomes(faults: FaultLog, row: str, shard: DamagedShard, bits: list[int]) -> Counter[str]:
    """Try all of them. Raises SilentError when one was read as other data."""
    found: Counter[str] = Counter()
    with every_fault(faults, row) as trial:
        for bit in bits:
            with trial(f"{shard.stage} shard of {len(shard.whole)} bytes, bit {bit}"):
                outcome = shard.outcome(bit)
                found[outcome] += 1
                if outcome == MISREAD:
                    raise SilentError(f"bit {bit} of a {shard.stage} shard")
    return found


@pytest.mark.parametrize(("stage", "stride"), [("rollout", 97), ("score", 97)])
def test_a_flipped_bit_of_a_small_shard_is_never_read_as_other_data(
    faults: FaultLog, tmp_path: Path, stage: str, stride: int
) -> None:
    shard = DamagedShard(tmp_path, stage, num_rows=8)
    bits = list(range(0, 8 * len(shard.whole), 1 if is_full() else stride))
    found = count_outcomes(faults, FLIP_SMALL, shard, bits)
    raw = raw_outcomes(shard.path, bits)
    print(f"\n{stage} shard of {len(shard.whole):,} bytes, {len(bits):,} flips: {dict(found)}; pyarrow {dict(raw)}")
    # What can flip without harm is what nobody reads: the leading magic, the page index, offsets and statistics.
    assert found[REFUSED] > 0.5 * len(bits)
    assert raw[MISREAD] > 0.1 * len(bits)


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_a_flipped_bit_of_a_large_shard_is_never_read_as_other_data(
    faults: FaultLog, tmp_path: Path, stage: str
) -> None:
    shard = DamagedShard(tmp_path, stage, num_rows=2500 if stage == "rollout" else 500, mean_length=250)
    assert len(shard.whole) > 2_000_000
    bits = shard.drawn(1500 if is_full() else 60, seed=11)
    found = count_outcomes(faults, FLIP_LARGE, shard, bits)
    raw = raw_outcomes(shard.path, bits)
    print(f"\n{stage} shard of {len(shard.whole):,} bytes, {len(bits):,} flips: {dict(found)}; pyarrow {dict(raw)}")
    assert found[REFUSED] > 0.9 * len(bits)
    assert raw[MISREAD] > 0.5 * len(bits)


def test_a_flipped_row_count_is_never_read_as_an_empty_shard(faults: FaultLog, tmp_path: Path) -> None:
    shard = DamagedShard(tmp_path, "rollout", num_rows=8)
    # A row group's own counts are the last bytes before the key-value metadata; no checksum covers them.
    end = shard.whole.rindex(FOOTER_KEY)
    count_outcomes(faults, FLIP_SMALL, shard, list(range(8 * (end - 40), 8 * end)))


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_every_page_has_a_checksum_that_is_verified(faults: FaultLog, tmp_path: Path, stage: str) -> None:
    shard = DamagedShard(tmp_path, stage, num_rows=8)
    with pq.ParquetFile(shard.path) as parquet:
        chunks = [parquet.metadata.row_group(0).column(index) for index in range(parquet.metadata.num_columns)]
    with every_fault(faults, FLIP_SMALL) as trial:
        for chunk in chunks:
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            shard.path.write_bytes(flipped(shard.whole, 8 * (start + chunk.total_compressed_size - 1)))
            with trial(f"last byte of {chunk.path_in_schema}"), pytest.raises(CorruptShardError, match="CRC checksum"):
                shard.read()


def test_a_list_shortened_by_its_page_header_is_refused(tmp_path: Path) -> None:
    """Page checksums leave out page headers: one bit of a value count drops the last id of the last row."""
    shards = rollout_set(tmp_path)
    rows = make_rollouts(8)
    shorter = replace(rows[-1], prompt_ids=rows[-1].prompt_ids[:-1])
    publish_rollouts(shards, 0, [*rows[:-1], shorter])
    table = pq.read_table(shards.path(0))
    hashes = pa.array([row.ids_hash for row in rows], pa.uint64())
    table = table.set_column(table.column_names.index("ids_hash"), "ids_hash", [hashes]).cast(shards.schema)
    shards.path(0).unlink()
    shards.publish(0, lambda: table.to_batches())
    with pytest.raises(CorruptShardError, match=r"parquet row 7: its token ids do not give its ids_hash.*Delete"):
        list(read_rollouts(shards, 0))


JSON_FILES = (
    "run.json", "episode=0/plan.json", "episode=0/rollouts/_SEALED.json", "episode=0/scores/teacher=main/plan.json",
    "episode=0/scores/teacher=main/_SEALED.json", "episode=0/learn/plan.json", "episode=0/policy/_COMPLETE.json",
    "episode=1/learn/checkpoint-000001/_COMPLETE.json", "evals/policy=1/summary.json",
)  # fmt: skip
VOUCHED_FOR = ("config.json", "generation_config.json", "tokenizer.json", "trainer/state.json", "trainer/canary.json")


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_flipped_bit_of_a_published_json_file_is_refused(
    faults: FaultLog, whole_run: Path, tmp_path: Path, name: str
) -> None:
    whole, path = (whole_run / name).read_bytes(), tmp_path / "file.json"
    with every_fault(faults, FLIP_SMALL) as trial:
        for bit in range(0, 8 * len(whole), 1 if is_full() else 401):
            path.write_bytes(flipped(whole, bit))
            with trial(f"{name}, bit {bit}"), pytest.raises(CorruptShardError):
                read_json(path)


@pytest.mark.parametrize("name", VOUCHED_FOR)
def test_a_flipped_bit_of_a_json_file_in_a_policy_is_refused(
    faults: FaultLog, whole_run: Path, tmp_path: Path, name: str
) -> None:
    folder = link_copy(whole_run / "episode=0/policy", tmp_path / "policy")
    whole = (folder / name).read_bytes()
    read = read_state if name == "trainer/state.json" else check_files
    with every_fault(faults, FLIP_SMALL) as trial:
        for bit in range(0, 8 * len(whole), 1 if is_full() and len(whole) < 10_000 else 8 * len(whole) // 20 + 1):
            with (
                trial(f"{name}, bit {bit}"),
                replaced(folder / name, flipped(whole, bit)),
                pytest.raises(CorruptShardError, match=name),
            ):
                read(folder)


@pytest.mark.parametrize("name", [*JSON_FILES, "episode=0/policy/config.json", "episode=0/policy/trainer/state.json"])
def test_verify_names_a_json_file_with_a_flipped_bit_and_no_other(
    faults: FaultLog, whole_run: Path, tmp_path: Path, name: str
) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    before, whole = published(run), (run / name).read_bytes()
    with every_fault(faults, FLIP_SMALL) as trial:
        for bit in drawn(name, 8 * len(whole), 200 if is_full() else 3):
            with trial(f"verify: {name}, bit {bit}"), replaced(run / name, flipped(whole, bit)):
                assert_found(run, before, name)


@pytest.mark.parametrize(
    "name", ["policy/model.safetensors", "policy/trainer/optimizer.safetensors", "learn/checkpoint-000001/model.safetensors"]
)  # fmt: skip
def test_a_flipped_bit_of_weights_is_found(faults: FaultLog, whole_run: Path, tmp_path: Path, name: str) -> None:
    """By verify, and before they are trained on or sampled from."""
    run = link_copy(whole_run, tmp_path / "run")
    file = run / "episode=1" / name
    folder = run / "episode=1" / name.partition("/trainer")[0].partition("/model")[0]
    before, whole = published(run), file.read_bytes()
    with every_fault(faults, FLIP_WEIGHTS) as trial:
        for number, bit in enumerate(drawn(name, 8 * len(whole), 500 if is_full() else 20)):
            with trial(f"{name}, bit {bit}"), replaced(file, flipped(whole, bit)):
                with pytest.raises(CorruptShardError, match="changed since it was published"):
                    check_files(folder)
                if number % 10 == 0:
                    assert_found(run, before, f"episode=1/{name}")
