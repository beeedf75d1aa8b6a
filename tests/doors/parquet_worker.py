"""Reads Parquet files that nobody can trust, for as long as the process lives: one JSON line in, one out.

In: {"op": "shard" | "views" | "prompts", "run": ..., "path": ...}. A first line says how many MiB of addresses it may take.
"""

import json
import resource
import sys
from pathlib import Path

from opd_cache.config import PromptsConfig
from opd_cache.errors import OpdCacheError
from opd_cache.prompts.sources import read_records
from opd_cache.run_dir import RunDir
from opd_cache.store.join import read_rollouts
from opd_cache.store.plans import load_rollout_plan, rollout_shards
from opd_cache.store.query import query_rows

MAX_MIB = 700  # more at one time; a page of 100 MB is unpacked more than once


def read(op: str, run: Path, path: Path) -> int:
    if op == "views":
        sql = "SELECT count(*), sum(num_response_tokens), sum(list_sum(sampling_logprobs)) FROM rollouts"
        return len(query_rows(run, sql)[1])
    if op == "prompts":
        return sum(1 for _ in read_records(PromptsConfig(path=str(path))))
    target = RunDir(run).episode(0)
    return sum(1 for _ in read_rollouts(rollout_shards(target, load_rollout_plan(target)), 0))


def main() -> None:
    grown = int(sys.stdin.readline()) << 20
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + grown, used + grown))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    for number, line in enumerate(sys.stdin):
        if number == 1:  # the first loads what all need
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        asked = json.loads(line)
        try:
            outcome = f"rows {read(asked['op'], Path(asked['run']), Path(asked['path']))}"
        except OpdCacheError as error:
            outcome = "refused" if "\n" not in str(error) else f"two lines: {error}"
        except MemoryError as error:
            outcome = f"memory {error}"
        except BaseException as error:
            outcome = f"traceback {type(error).__name__}: {error}"
        grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if outcome.startswith(("rows", "refused")) and grew - peak > MAX_MIB:
            outcome = f"memory: {grew - peak} MiB"
        peak = max(peak, grew)
        print(json.dumps(outcome[:500]), flush=True)


if __name__ == "__main__":
    main()
