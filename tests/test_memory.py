"""Peak memory of the stages does not grow with the episode."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import opd_cache_command, write_jsonl

RESPONSE_TOKENS = 40
ROLLOUTS = {"short": 1_000, "long": 10_000}


def peak_bytes(*arguments: str) -> int:
    """Run a command to its end; its peak resident memory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(opd_cache_command(*arguments), env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors
    return usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def peaks(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Peak memory of each stage for each episode length."""
    folder = tmp_path_factory.mktemp("memory")
    prompts = write_jsonl(
        folder / "prompts.jsonl", [{"prompt": f"sort {i}:"} for i in range(max(ROLLOUTS.values()) // 2)]
    )
    found: dict[str, dict[str, int]] = {}
    for name, count in ROLLOUTS.items():
        recipe = [
            str(task / "recipe.yaml"), f"run_dir={folder / name}", f"prompts.path={prompts}", "rollout.sampler=random_sampler:RandomSampler",
            f"rollout.prompts_per_episode={count // 2}", "rollout.prompts_per_shard=250", f"rollout.max_new_tokens={RESPONSE_TOKENS}",
            "score.top_k=16", "score.max_tokens_per_batch=4096", "learn.train_batch_size=250", "learn.max_tokens_per_micro_batch=4096",
        ]  # fmt: skip
        found[name] = {stage: peak_bytes(stage, *recipe, "--episode", "0") for stage in ("rollout", "score", "learn")}
    print(
        {name: {stage: f"{size / 2**20:.0f} MiB" for stage, size in stages.items()} for name, stages in found.items()}
    )
    return found


@pytest.mark.parametrize("stage", ["rollout", "score", "learn"])
def test_peak_memory_does_not_grow_with_the_episode(peaks: dict[str, dict[str, int]], stage: str) -> None:
    short, long = peaks["short"][stage], peaks["long"][stage]
    assert abs(long / short - 1) < 0.10, (
        f"{stage}: {short / 2**20:.0f} MiB for {ROLLOUTS['short']} rollouts, {long / 2**20:.0f} MiB for {ROLLOUTS['long']}"
    )
    # The long episode's top-k alone would be 51 MB in memory; the whole growth is a small part of that.
    assert long - short < 20 * 2**20
