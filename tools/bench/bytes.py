"""What a run's cache costs in bytes a response token, by column, and how near that is to the entropy of the numbers.

    python tools/bench/bytes.py RUN... [--quickstart FOLDER [--episodes N]] [--json]

--quickstart: also of a quickstart made for it with the teacher's top 16, whose task is in FOLDER or made there.
`bytes` is what a column takes in the shards (pages compressed, their headers, lists' levels). `entropy` is a bound for any
lossless coder that knows nothing but how often each value of one byte place occurs: the order-0 entropy of the column's
four byte planes. Below it only a model of the numbers could go.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from opd_cache.run_dir import RunDir
from opd_cache.store.rows import row_group
from opd_cache.store.shards import read_row_groups

# Of ids and one log-prob, of a teacher's log-prob, and of its top 16 (ids and log-probs): bytes a response token.
TARGETS = {"ids + sampling log-prob": 4.5, "teacher log-prob": 3.1, "top 16": 51.0}
PARTS = {
    "ids + sampling log-prob": ("response_ids", "sampling_logprobs"),
    "teacher log-prob": ("teacher_logprobs",),
    "top k": ("topk_ids", "topk_logprobs"),
}


@dataclass
class Column:
    """Sums over all shards."""

    size_bytes: int = 0
    num_values: int = 0
    planes: np.ndarray = field(default_factory=lambda: np.zeros((4, 256), np.int64))

    def entropy_bytes(self) -> float:
        counts = self.planes[self.planes.sum(1) > 0]
        shares = counts / counts.sum(1, keepdims=True)
        bits = -np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0).sum()
        return float(bits / 8 * self.num_values)


def shards_of(run: RunDir) -> Iterator[Path]:
    for episode in run.episodes():
        target = run.episode(episode)
        yield from sorted(target.rollouts.glob("shard-*.parquet"))
        yield from sorted(target.plan.parent.glob("scores/*/shard-*.parquet"))


def count(path: Path, columns: dict[str, Column]) -> None:
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            name = chunk.path_in_schema.partition(".")[0]
            columns.setdefault(name, Column()).size_bytes += chunk.total_compressed_size
    for table in read_row_groups(path):
        for name, lists in row_group(table).lists.items():
            columns[name].num_values += len(lists.values)
            if lists.values.dtype.itemsize == 4:
                planes = np.ascontiguousarray(lists.values).view(np.uint8).reshape(-1, 4).T
                columns[name].planes += np.stack([np.bincount(plane, minlength=256) for plane in planes])


def measure(path: Path) -> dict[str, Any]:
    columns: dict[str, Column] = {}
    for shard in shards_of(RunDir(path)):
        count(shard, columns)
    tokens = columns["response_ids"].num_values
    teacher_tokens = columns["teacher_logprobs"].num_values if "teacher_logprobs" in columns else 0
    scores = ("teacher_", "topk_", "error")
    rows = []
    for name, column in columns.items():
        per = teacher_tokens if name.startswith(scores) else tokens
        entropy = column.entropy_bytes() / per if column.planes.any() else None
        rows.append(
            {"column": name, "bytes": column.size_bytes / per, "entropy": entropy, "values": column.num_values / per}
        )
    found = {row["column"]: row["bytes"] for row in rows}
    parts = {part: sum(found.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    return {"run": str(path), "tokens": tokens, "columns": rows, "parts": parts}


def measure_quickstart(task: Path, episodes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable, "-m", "opd_cache", "run", "quickstart", f"task.dir={task}", f"run_dir={name}/quickstart",
            f"num_episodes={episodes}", "eval.path=null", "score.top_k=16",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        return measure(Path(name) / "quickstart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="*")
    parser.add_argument("--quickstart", type=Path, metavar="FOLDER")
    parser.add_argument("--episodes", type=int, default=12, help="of --quickstart")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [measure(run) for run in options.run]
    if options.quickstart:
        found.append(measure_quickstart(options.quickstart, options.episodes))
    if options.json:
        print(json.dumps(found))
        return
    for row in found:
        print(
            f"\n{row['run']}: {row['tokens']} response tokens\n\n| column | values | bytes | entropy |\n|---|---|---|---|"
        )
        for column in sorted(row["columns"], key=lambda column: -column["bytes"]):
            entropy = "" if column["entropy"] is None else f"{column['entropy']:.2f}"
            print(f"| {column['column']} | {column['values']:.2f} | {column['bytes']:.2f} | {entropy} |")
        print("\n" + ", ".join(f"{part} {value:.2f}" for part, value in row["parts"].items()), f"(goals {TARGETS})")


if __name__ == "__main__":
    main()
