"""Peak memory of the stages does not grow with the episode. Of the other scorers: score/test_http_memory.py, with_vllm/."""

from pathlib import Path

import pytest
from peak_memory import long_episode, stage_peak_bytes, write_prompts

ROLLOUTS = {"short": 1_000, "long": 10_000}


@pytest.fixture(scope="module")
def peaks(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Peak memory of each stage for each episode length."""
    folder = tmp_path_factory.mktemp("memory")
    prompts = write_prompts(folder / "prompts.jsonl", max(ROLLOUTS.values()) // 2)
    found: dict[str, dict[str, int]] = {}
    for name, count in ROLLOUTS.items():
        recipe = [
            *long_episode(task, folder / name, prompts, count), "score.top_k=16", "score.max_tokens_per_batch=4096",
            "learn.train_batch_size=250", "learn.max_tokens_per_micro_batch=4096",
        ]  # fmt: skip
        found[name] = {stage: stage_peak_bytes(stage, recipe) for stage in ("rollout", "score", "learn")}
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
    # The long episode's top-k alone would be 51 MB in memory. What ten times the steps leave in the heaps of glibc and
    # Arrow differs from run to run: 2 to 28 MiB.
    assert long - short < 36 * 2**20
