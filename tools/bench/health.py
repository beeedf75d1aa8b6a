"""What the health checks cost a stage: time in them ÷ time of the stage, on a made run without a model.

    python tools/bench/health.py [--tokens 20000000] [--json]

A made stage draws random numbers and writes them, some 3 M tokens a second on one core; one with a model takes a hundred
times as long and more, so that the shares here are upper bounds.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MAKE = Path(__file__).parent.parent / "make_big_run.py"


def measure(tokens: int) -> list[dict[str, Any]]:
    """Seconds of each stage of a made run, and of its health checks."""
    made, seconds = maker(), defaultdict(float)

    def timed(call: Callable, name: str) -> Callable:
        def timed_call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                seconds[name if name != "stage" else arguments[0]] += time.perf_counter() - start

        return timed_call

    for name in ("rollout_figures", "score_figures", "check_episode"):
        setattr(made, name, timed(getattr(made, name), name))
    made.make_shards = timed(made.make_shards, "stage")  # by its first argument: rollout, score
    with tempfile.TemporaryDirectory() as folder:
        made.make_run(Path(folder) / "run", made.Shape(tokens, 10, 16, 4, 1024))
    rows = [("rollout", seconds["rollout_figures"]), ("score", seconds["score_figures"])]
    # The look at the seals and steps of an episode, against all of its stages.
    rows.append(("whole episodes", seconds["check_episode"]))
    totals = {"whole episodes": seconds["rollout"] + seconds["score"], **seconds}
    return [{"stage": name, "seconds": totals[name], "health_s": spent, "share": spent / totals[name]} for name, spent in rows]  # fmt: skip


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_big_run", MAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.tokens)
    if options.json:
        print(json.dumps(rows))
        return
    print("| stage | seconds | health | share |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['stage']} | {row['seconds']:.2f} | {row['health_s']:.3f} | {row['share']:.2%} |")


if __name__ == "__main__":
    main()
