"""How fast `opd-cache verify` reads, beside sha256 of the same files and beside decoding them without any check.

    python tools/bench/verify.py [RUN] [--tokens 20000000] [--threads 2] [--repeats 3] [--json]

Without RUN a made run of that many response tokens (tools/make_big_run.py) is read. The readers take turns, each in a process
of its own, with the files in the page cache; the median of the repeats counts. `sha256sum` and hashlib use one core, the
others all that they are given. CPU seconds say what a reading costs where other work takes the cores away.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from opd_cache.verify.run import verify_run

MAKE = Path(__file__).parent.parent / "make_big_run.py"
TARGET = 0.8  # of sha256sum


def data_files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*.parquet") if path.is_file())


def hash_files(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")


def decode_files(files: list[Path], threads: int) -> None:
    """Page checksums, decompression and decoding of all columns: what any reader of these files pays."""

    def decode(path: Path) -> None:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group, use_threads=False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, files))


def verify_files(run: Path) -> None:
    if findings := verify_run(run).findings:
        raise RuntimeError(f"{run} is not clean: {findings[0].problem}")


def sha256sum(files: list[Path]) -> None:
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


READERS = ("sha256sum", "hashlib", "decoding alone", "verify")


def timed_reading(reader: str, run: Path, threads: int) -> dict[str, float]:
    """Seconds, and CPU seconds, of this process and its children, imports apart."""
    files = data_files(run)
    work: dict[str, Callable[[], None]] = {
        "sha256sum": lambda: sha256sum(files),
        "hashlib": lambda: hash_files(files),
        "decoding alone": lambda: decode_files(files, threads),
        "verify": lambda: verify_files(run),
    }
    start, cpu_before = time.perf_counter(), cpu_seconds()
    work[reader]()
    return {"seconds": time.perf_counter() - start, "cpu_s": cpu_seconds() - cpu_before}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def read_apart(reader: str, run: Path, threads: int) -> dict[str, float]:
    """The same in a process of its own, on so many cores."""
    cores = ["taskset", "-c", f"0-{threads - 1}"]
    command = [*cores, sys.executable, __file__, str(run), "--threads", str(threads), "--read", reader]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return json.loads(done.stdout)


@contextmanager
def given_or_made(run: Path | None, tokens: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        if run is None:
            command = [sys.executable, MAKE, Path(name) / "big", "--tokens", str(tokens)]
            subprocess.run(command, check=True, capture_output=True)
        yield run or Path(name) / "big"


def measure(run: Path, threads: int, repeats: int) -> list[dict[str, Any]]:
    size = sum(path.stat().st_size for path in data_files(run))
    hash_files(data_files(run))  # into the page cache
    turns = [{reader: read_apart(reader, run, threads) for reader in READERS} for _ in range(repeats)]
    seconds, cpu = (
        {reader: median(turn[reader][key] for turn in turns) for reader in READERS} for key in ("seconds", "cpu_s")
    )
    return [
        {
            "reader": reader,
            "seconds": seconds[reader],
            "cpu_s": cpu[reader],
            "mb_per_s": size / seconds[reader] / 1e6,
            "of_sha256sum": seconds["sha256sum"] / seconds[reader],
            "target": TARGET if reader == "verify" else None,
        }
        for reader in READERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(timed_reading(options.read, options.run, options.threads)))
        return
    with given_or_made(options.run, options.tokens) as run:
        rows = measure(run, options.threads, options.repeats)
    if options.json:
        print(json.dumps(rows))
        return
    print("| reader | seconds | CPU s | MB/s | ÷ sha256sum | target |\n|---|---|---|---|---|---|")
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g}"
        print(
            f"| {row['reader']} | {row['seconds']:.3f} | {row['cpu_s']:.3f} | {row['mb_per_s']:.0f} | {row['of_sha256sum']:.2f} | {target} |"
        )


if __name__ == "__main__":
    main()
