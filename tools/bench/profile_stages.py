"""Where the time of each stage goes, by torch's profiler: shares of its wall time, by kind of operator.

    python tools/bench/profile_stages.py [--task letters|vocabulary] [--tokens 300] [--ops 6] [--json FILE]

The recipes of opd_vs_trl.py, one episode, its stages one after the other in this process, loading and saving included.
`rest` is the time in no operator: Python, files, hashes. What Python does in it: py-spy record --native -- opd-cache run ...
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import opd_vs_trl
from torch.profiler import ProfilerActivity, profile

from opd_cache.pipeline import InlineStages
from opd_cache.recipes import load_recipe
from opd_cache.run import open_run

STAGES = ("rollout", "score", "learn")
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("attention", "attn"),
    "copies": ("copy_", "cat", "clone", "index_select", "gather", "index", "fill_", "zero_"),
    "softmax, choice": ("softmax", "exp", "cumsum", "topk", "argmax", "searchsorted", "scatter"),
    "optimizer": ("adamw", "norm"),
}


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").strip("_").lower()
    for kind, parts in KINDS.items():
        if any(name == part.strip("_") or (len(part) > 4 and part in name) for part in parts):
            return kind
    return "other operators"


def profile_stage(stages: InlineStages, stage: str) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        stages(stage, 0)
        seconds = time.perf_counter() - start
    by_operator = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    kinds: dict[str, float] = defaultdict(float)
    for operator, time_s in by_operator.items():
        kinds[kind_of(operator)] += time_s
    kinds["rest"] = max(0.0, seconds - sum(kinds.values()))
    return {"seconds": seconds, "kinds": dict(kinds), "operators": by_operator}


def table(found: dict[str, dict[str, Any]], count: int) -> str:
    kinds = [*KINDS, "other operators", "rest"]
    lines = [f"| stage | s | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for stage, row in found.items():
        shares = (f"{row['kinds'].get(kind, 0) / row['seconds']:.0%}" for kind in kinds)
        lines.append(f"| {stage} | {row['seconds']:.1f} | {' | '.join(shares)} |")
    for stage, row in found.items():
        first = sorted(row["operators"].items(), key=lambda item: -item[1])[:count]
        lines.append(f"{stage}: " + ", ".join(f"{name} {time_s / row['seconds']:.1%}" for name, time_s in first))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("letters", "vocabulary"), default="vocabulary")
    parser.add_argument("--tokens", type=int, default=300, help="of a response, with --task vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", type=int, default=6, help="operators to name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = ["--only", "opd-cache", "--episodes", "1"]
    recipe += [text for key in ("task", "tokens", "threads") for text in (f"--{key}", str(getattr(options, key)))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = getattr(opd_vs_trl, options.task)(folder, opd_vs_trl.options_of(recipe))
        run = open_run(load_recipe([*arguments, f"run_dir={folder}/run"]))
        stages = InlineStages(run)
        found = {stage: profile_stage(stages, stage) for stage in STAGES}
    print(table(found, options.ops))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
