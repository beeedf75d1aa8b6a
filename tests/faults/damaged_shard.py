"""One shard with flipped bits, read as a stage reads it, and as plain pyarrow would read it without our checks."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from store_helpers import (
    make_rollouts,
    make_scores,
    publish_rollouts,
    publish_scores,
    rollout_set,
    same_rows,
    score_set,
)

from opd_cache.errors import AlignmentError, CorruptShardError, MismatchError
from opd_cache.store.join import join_shard, read_rollouts

REFUSED, HARMLESS, MISREAD = "refused", "the same data", "other data"
CHUNK = 500  # flips that one process tries


class DamagedShard:
    """Reads a stage's rows back after bits of its one shard were flipped."""

    def __init__(self, run: Path, stage: str, num_rows: int, mean_length: int = 12) -> None:
        rollouts, scores = rollout_set(run), score_set(run)
        rows = make_rollouts(num_rows, mean_length=mean_length)
        publish_rollouts(rollouts, 0, rows, rows_per_group=64)
        publish_scores(scores, 0, make_scores(rows))
        self.stage, self.shards = stage, rollouts if stage == "rollout" else scores
        # Scores are read only beside their rollouts.
        self.read = (
            (lambda: list(read_rollouts(rollouts, 0)))
            if stage == "rollout"
            else (lambda: [score for _, score in join_shard(rollouts, scores, 0)])
        )
        self.path = self.shards.path(0)
        self.whole = self.path.read_bytes()
        self.rows = self.read()

    def outcome(self, *bits: int) -> str:
        """What becomes of the shard with these bits flipped."""
        with open(self.path, "r+b") as file:
            flip(file, bits)
        try:
            found = self.read()
        except (CorruptShardError, MismatchError, AlignmentError):
            return REFUSED
        finally:
            with open(self.path, "r+b") as file:
                flip(file, bits)
        return HARMLESS if same_rows(found, self.rows) else MISREAD

    def drawn(self, count: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(8 * len(self.whole)) for _ in range(count)]


def flip(file, bits: Sequence[int]) -> None:
    for bit in bits:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def raw_outcomes(path: Path, bits: Sequence[int]) -> Counter[str]:
    """The same of plain pyarrow: page checksums not verified, no footer, no hash, no digest compared."""
    found: Counter[str] = Counter()
    for start in range(0, len(bits), CHUNK):
        found.update(_in_a_process(str(path), list(bits[start : start + CHUNK])))
    return found


def _in_a_process(path: str, bits: list[int]) -> Iterator[str]:
    """A damaged file can end the process that reads it: then the half is looked for in which that happens."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            yield from pool.submit(_raw_reads, path, bits).result()
            return
        except BrokenProcessPool:
            pass
    if len(bits) == 1:
        yield REFUSED
    else:
        yield from _in_a_process(path, bits[: len(bits) // 2])
        yield from _in_a_process(path, bits[len(bits) // 2 :])


def _raw_reads(path: str, bits: list[int]) -> list[str]:
    data = bytearray(Path(path).read_bytes())
    whole, outcomes = _raw_read(data), []
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        try:
            outcomes.append(HARMLESS if _raw_read(data).equals(whole) else MISREAD)
        except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError):
            outcomes.append(REFUSED)
        data[bit // 8] ^= 1 << bit % 8
    return outcomes


def _raw_read(data: bytearray) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(pa.py_buffer(bytes(data))), page_checksum_verification=False).read(
        use_threads=False
    )
