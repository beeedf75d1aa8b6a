"""What joining costs a learner: response tokens a CPU-second from sealed shards to checked rows, against decoding alone.

    python tools/bench/join.py [RUN] [--tokens 5000000] [--repeats 3] [--json]

Without RUN a made run of that many response tokens (tools/make_big_run.py): one teacher, no top k. `join` is the learner's
own path: page checksums, ids hashes, lengths, values, the rows of both sides beside each other. `decode` is pyarrow
reading the same row groups into Arrow, with checksums and nothing else: the floor. CPU-seconds of the whole process, over
all its threads; medians of turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import query

from opd_cache.run_dir import RunDir
from opd_cache.store.join import join_stages
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_parts
from opd_cache.store.shards import ShardSet, read_row_groups

TEACHER = "main"


def stages_of(run: RunDir) -> list[tuple[ShardSet, ShardSet]]:
    """(rollouts, scores) of every episode."""
    found = []
    for episode in run.episodes():
        target = run.episode(episode)
        plan = load_rollout_plan(target)
        found.append((rollout_shards(target, plan), score_parts(target, plan, TEACHER)[0]))
    return found


def join(stages: list[tuple[ShardSet, ShardSet]]) -> int:
    return sum(len(rollout.response_ids) for pair in stages for rollout, _ in join_stages(*pair))


def decode(stages: list[tuple[ShardSet, ShardSet]]) -> int:
    values = 0
    for pair in stages:
        for shards in pair:
            for shard in range(shards.num_shards):
                for table in read_row_groups(shards.path(shard)):
                    values += table.num_rows
    return values


def cpu_seconds(
    work: Callable[[list[tuple[ShardSet, ShardSet]]], int], stages: list[tuple[ShardSet, ShardSet]]
) -> float:
    start = time.process_time()
    work(stages)
    return time.process_time() - start


def measure(run: Path | None, tokens: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        path = run or query.make(Path(name) / "big", "--tokens", str(tokens))
        stages = stages_of(RunDir(path))
        num_tokens = join(stages)  # warms the page cache, too
        seconds: dict[str, list[float]] = {"join": [], "decode": []}
        for _ in range(repeats):
            seconds["join"].append(cpu_seconds(join, stages))
            seconds["decode"].append(cpu_seconds(decode, stages))
        rows = sum(load_rollout_plan(RunDir(path).episode(episode)).num_rollouts for episode in RunDir(path).episodes())
        rates = {f"{part}_tokens_per_cpu_s": num_tokens / statistics.median(times) for part, times in seconds.items()}
        return {"tokens": num_tokens, "rows": rows, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.run, options.tokens, options.repeats)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['tokens']} response tokens in {found['rows']} rows")
    for part in ("join", "decode"):
        print(f"{part}: {found[f'{part}_tokens_per_cpu_s'] / 1e6:.1f} M tokens a CPU-second")


if __name__ == "__main__":
    main()
