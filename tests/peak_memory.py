"""What a process needs of memory, and recipes of episodes of many rollouts to measure it with."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import opd_cache_command, write_jsonl

# A process counts what it had before exec, as a copy of its parent: pytest, which may be larger. This parent is small.
MEASURE = """
import resource, subprocess, sys
ended = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended.returncode)
"""


def peak_bytes(command: list[str]) -> int:
    """Run a command to its end; its peak resident memory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run([sys.executable, "-c", MEASURE, *command], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout) * 1024


def stage_peak_bytes(stage: str, recipe: list[str]) -> int:
    return peak_bytes(opd_cache_command(stage, *recipe, "--episode", "0"))


def write_prompts(path: Path, count: int) -> Path:
    return write_jsonl(path, [{"prompt": f"sort {i}:"} for i in range(count)])


def long_episode(task: Path, run_dir: Path, prompts: Path, rollouts: int, shard: int = 500) -> list[str]:
    """A recipe of so many rollouts of 40 random tokens, two a prompt and `shard` in each shard."""
    return [
        str(task / "recipe.yaml"), f"run_dir={run_dir}", f"prompts.path={prompts}", "rollout.sampler=random_sampler:RandomSampler",
        f"rollout.prompts_per_episode={rollouts // 2}", f"rollout.prompts_per_shard={shard // 2}", "rollout.max_new_tokens=40",
    ]  # fmt: skip


def told(few: int, many: int) -> str:
    return f"{few / 2**20:.0f} MiB, and {many / 2**20:.0f} MiB for 20 times the rollouts: {many / few:.3f}"
