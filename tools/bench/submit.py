"""How long `opd-cache submit` plans and `opd-cache status` answers, on a real Slurm with a long queue.

    python tools/bench/submit.py [--shards 1000] [--episodes 5] [--json]

Every episode has that many rollout and score shards, and an array task for each: 1,000 shards and 5 episodes are
10,000 array indices. All jobs are held, so that nothing but planning is measured. Each figure is the best of 3.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"
SANDBOX = Path(__file__).parents[1] / "slurm" / "sandbox.sh"
REPEATS = 3


def seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def make_task(folder: Path, num_prompts: int) -> Path:
    """A recipe with tiny models and that many prompts."""
    sys.path.insert(0, str(TESTS))
    from helpers import save_model, tiny_qwen2, write_jsonl

    save_model(tiny_qwen2(seed=1), folder / "student")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"sort {index}:"} for index in range(num_prompts)])
    recipe = {
        "run_dir": f"{folder}/run",
        "student": {"model": f"{folder}/student"},
        "teachers": {"main": {"model": f"{folder}/student"}},
        "prompts": {"path": f"{folder}/prompts.jsonl"},
        "rollout": {"prompts_per_episode": num_prompts, "prompts_per_shard": 1, "max_new_tokens": 16},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def measure(folder: Path, num_shards: int, num_episodes: int) -> dict[str, float]:
    cluster = folder / "cluster.yaml"
    tasks = {"num_tasks": num_shards}
    cluster.write_text(json.dumps({"defaults": {"sbatch": ["--hold"]}, "rollout": tasks, "score": tasks}))
    slurm = Path(f"/tmp/opd-cache-slurm-{os.getpid()}")  # sockets lie in it, so its path must be short
    start = {**os.environ, "SLURM_SANDBOX_MAX_ARRAY": str(num_shards + 1), "SLURM_SANDBOX_MAX_JOBS": "50000"}
    subprocess.run([SANDBOX, "start", slurm], env=start, check=True, stdout=subprocess.DEVNULL)
    try:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        environment = {**os.environ, "SLURM_CONF": f"{slurm}/slurm.conf", "PATH": path}
        command = [sys.executable, "-m", "opd_cache"]
        recipe = make_task(folder, num_shards)
        submit = [*command, "submit", str(recipe), str(cluster), f"num_episodes={num_episodes}"]
        sending = seconds(submit, environment)
        queued = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], env=environment, capture_output=True, text=True)
        return {
            "shards": num_shards * 2 * num_episodes,
            "queued_tasks": len(queued.stdout.splitlines()),
            "submit_and_send_s": sending,
            "submit_again_s": min(seconds(submit, environment) for _ in range(REPEATS)),
            "status_s": min(
                seconds([*command, "status", f"{folder}/run", "--json"], environment) for _ in range(REPEATS)
            ),
        }
    finally:
        subprocess.run([SANDBOX, "stop", slurm], check=True, capture_output=True)
        shutil.rmtree(slurm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000, help="of a stage")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.shards, options.episodes)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20} {value:.2f}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    main()
