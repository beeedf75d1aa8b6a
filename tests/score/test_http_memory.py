"""Peak memory of scoring by a served teacher does not grow with the episode."""

from pathlib import Path

import numpy as np
import pytest
from peak_memory import long_episode, stage_peak_bytes, told, write_prompts
from served_teacher import ServedTeacher


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_episode(task: Path, tmp_path: Path) -> None:
    """The teacher looks the next token up by the last: of so many answers only the size counts."""
    logits_VV = np.random.default_rng(0).normal(0, 2, (258, 258))
    logprobs_VV = logits_VV - np.log(np.exp(logits_VV).sum(1, keepdims=True))
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2_500)
    peaks = []
    with ServedTeacher(lambda ids: logprobs_VV[ids], "sglang") as served:
        for rollouts in (250, 5_000):
            recipe = long_episode(task, tmp_path / str(rollouts), prompts, rollouts, shard=250)
            recipe += ["score.top_k=16", "score.scorer=http", f"score.http.urls=[{served.url}]"]
            stage_peak_bytes("rollout", recipe)
            peaks.append(stage_peak_bytes("score", recipe))
    print(told(*peaks))
    assert peaks[1] / peaks[0] < 1.05, told(*peaks)
