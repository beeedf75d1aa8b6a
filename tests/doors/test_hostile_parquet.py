"""Parquet files with hostile footers and pages: refused in bounded memory and time, and the process lives."""

import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_log import FaultLog, is_full
from helpers import write_jsonl

ROW = "hostile Parquet files"
GROWN_MIB = 10_000
MAX_SECONDS = 60.0
SHARD = "episode=0/rollouts/shard-00000-of-00003.parquet"
OPS = ("shard", "views", "prompts")


class Reader:
    """parquet_worker.py, begun again after it died."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.process: subprocess.Popen | None = None

    def read(self, op: str, path: Path) -> str:
        """How the reading ended; raises AssertionError when the process did not outlive it."""
        if self.process is None:
            command = [sys.executable, str(Path(__file__).parent / "parquet_worker.py")]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.process.stdin.write(f"{GROWN_MIB}\n")
            self.ask("shard", self.run / SHARD, 120)  # imports take their time
        return self.ask(op, path, MAX_SECONDS)

    def ask(self, op: str, path: Path, within_s: float) -> str:
        process = self.process
        process.stdin.write(json.dumps({"op": op, "run": str(self.run), "path": str(path)}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], within_s)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise AssertionError(f"{op} of {path}: {'no answer' if not ready else f'ended with {process.returncode}'}")
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def reader(shared_run: Path) -> Iterator[Reader]:
    reader = Reader(shared_run)
    yield reader
    reader.close()


def assert_survives(
    faults: FaultLog, fault: str, reader: Reader, content: bytes, ops: tuple[str, ...] = OPS
) -> list[str]:
    """How every way to read this content, in the place of a shard, ends."""
    path = reader.run / SHARD
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    try:
        outcomes = []
        for op in ops:
            with faults.trial(ROW, f"{fault}, {op}"):
                outcome = reader.read(op, path)
                if not outcome.startswith(("rows", "refused")):
                    kept = Path(os.environ.get("DOORS_KEEP", "/nonexistent"))
                    if kept.is_dir():
                        (kept / f"{abs(hash(content))}.parquet").write_bytes(content)
                    raise AssertionError(f"{fault}, {op}: {outcome}")
                outcomes.append(outcome)
        return outcomes
    finally:
        path.unlink()
        path.write_bytes(before)


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def test_a_whole_shard_is_read_in_every_way(faults: FaultLog, reader: Reader) -> None:
    assert assert_survives(faults, "none", reader, (reader.run / SHARD).read_bytes()) == ["rows 8", "rows 1", "rows 8"]


@pytest.mark.parametrize("part", ["footer", "pages"])
def test_random_bytes_are_refused_and_the_process_lives(faults: FaultLog, reader: Reader, part: str) -> None:
    data = (reader.run / SHARD).read_bytes()
    start = footer_start(data)
    first, last = (start, len(data)) if part == "footer" else (4, start)
    for seed in range(2000 if is_full() else 40):
        rng = random.Random(seed)
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(first, last)
            # 0xff continues a varint: counts and sizes become huge.
            new = rng.choice([b"\xff", bytes([rng.randrange(256)]), b"\xff" * 9 + b"\x01", rng.randbytes(8)])
            changed[at : at + len(new)] = new[: len(changed) - at]
        assert_survives(faults, f"{part}: random bytes", reader, bytes(changed))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def with_footer(data: bytes, footer: bytes) -> bytes:
    return data[: footer_start(data)] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_every_count_of_the_footer_made_huge_is_refused(faults: FaultLog, reader: Reader) -> None:
    """Each byte of the footer that ends a number is made a number of 2^31, 2^40 and 2^62, and a negative one."""
    data = (reader.run / SHARD).read_bytes()
    footer = data[footer_start(data) : -8]
    places = [at for at in range(len(footer)) if footer[at] < 0x80]
    step = 1 if is_full() else max(1, len(places) // 12)
    for at in places[::step]:
        for value in (2**32, 2**41, 2**63 - 1, 2**63 + 1):
            changed = footer[:at] + varint(value) + footer[at + 1 :]
            assert_survives(faults, "footer: a huge number", reader, with_footer(data, changed))


def test_footers_that_claim_much_are_refused(faults: FaultLog, reader: Reader, tmp_path: Path) -> None:
    data = (reader.run / SHARD).read_bytes()
    # Thrift's compact protocol: field 2, a list of 2^31 structs; field 2, a list of a million empty structs.
    claims = {
        "2^31 columns claimed": b"\x15\x02\x19\xfc" + varint(2**31 - 1),
        "a million columns": b"\x15\x02\x19\xfc" + varint(1_000_000) + b"\x00" * 1_000_000 + b"\x00",
        "a name of 2^31 bytes": b"\x15\x02\x19\x1c\x48" + varint(2**31 - 1) + b"x",
        "structs without end": b"\x1c" * 200_000,
        "lists without end": b"\x19" * 200_000,
        "nothing": b"",
        "zeros": bytes(100_000),
    }
    for name, footer in claims.items():
        assert_survives(faults, f"footer: {name}", reader, with_footer(data, footer))
    for length in (0, 1, 2**31 - 1, 2**32 - 1, len(data), len(data) - 8, len(data) - 12):
        claimed = data[:-8] + length.to_bytes(4, "little") + b"PAR1"
        assert_survives(faults, f"footer: claims {length} bytes", reader, claimed)
    for length in (0, 3, 4, 8, 11, 12, len(data) // 2, len(data) - 1):
        assert_survives(faults, f"cut to {length} bytes", reader, data[:length])


def test_schemas_of_others_are_refused(faults: FaultLog, reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    deep = pa.array([1])
    for _ in range(60):
        deep = pa.ListArray.from_arrays(pa.array([0, len(deep)], pa.int32()), deep)
    tables = {
        "5,000 columns": pa.table({f"c{n}": [1] for n in range(5_000)}),
        "lists in lists": pa.table({"x": deep}),
        "a text of 100 MB in one page": pa.table({"x": ["a" * 100_000_000]}),
        "no rows": pa.table({"x": pa.array([], pa.int64())}),
        "no columns": pa.table({}),
    }
    for name, table in tables.items():
        pq.write_table(table, path, compression="zstd")
        assert assert_survives(faults, name, reader, path.read_bytes(), ("shard",)) == ["refused"]
    write_jsonl(path, [{"a": 1}])
    assert assert_survives(faults, "JSON lines", reader, path.read_bytes()) == ["refused"] * 3
