"""Made-up rollouts and scores, and shard sets of them, with everything that the real stages store."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np

from opd_cache.store.rows import group_sizes, rollout_batch, rollouts_schema, score_batch, scores_schema
from opd_cache.store.shards import ShardSet
from opd_cache.types import Rollout, Score

SAMPLES_PER_PROMPT = 2
ROLLOUT_COMMAND = "opd-cache rollout RECIPE --episode 3"
SCORE_COMMAND = "opd-cache score RECIPE --episode 3 --teacher main"


def make_rollouts(count: int, seed: int = 0, mean_length: int = 12, vocabulary: int = 50_000) -> list[Rollout]:
    """Rollouts with Zipf-like ids; every seventh response is empty."""
    rng = np.random.default_rng(seed)
    return [
        _make_rollout(rng, index, 0 if index % 7 == 3 else int(rng.integers(1, 2 * mean_length)), vocabulary)
        for index in range(count)
    ]


def _make_rollout(rng: np.random.Generator, index: int, length: int, vocabulary: int) -> Rollout:
    prompt, sample = divmod(index, SAMPLES_PER_PROMPT)
    return Rollout(
        rollout_id=f"3/{prompt}/{sample}",
        prompt_index=prompt,
        sample_index=sample,
        prompt_ids=zipf_ids(rng, 1 + prompt % 5, vocabulary),
        response_ids=zipf_ids(rng, length, vocabulary),
        sampling_logprobs=likely_logprobs(rng, length),
        finish_reason="stop" if index % 3 else "length",
        policy_version=3,
    )


def zipf_ids(rng: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    """Token ids whose frequencies fall as 1 / rank. Merges come in order of frequency, so the id is about the rank."""
    ranks = np.exp(rng.uniform(0, np.log(vocabulary), count)) * rng.uniform(0.7, 1.3, count)
    return np.clip(ranks, 0, vocabulary - 1).astype(np.int32)


def likely_logprobs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-probs as a model's own samples have them: most near 0, a tail down to -10 and beyond.

    They are multiples of 2**-19, the spacing of the float32 logits around 20 that they are differences of.
    """
    return (np.round(-np.exp(rng.normal(-2.5, 2.2, count)) * 2**19) / 2**19).astype(np.float32)


def make_scores(rollouts: Sequence[Rollout], top_k: int = 4, seed: int = 1) -> list[Score]:
    """A score for each rollout."""
    rng = np.random.default_rng(seed)
    scores = []
    for rollout in rollouts:
        length = len(rollout.response_ids)
        topk_logprobs = -np.sort(-likely_logprobs(rng, length * top_k).reshape(length, top_k), axis=1)
        scores.append(
            Score(
                rollout_id=rollout.rollout_id,
                ids_hash=rollout.ids_hash,
                teacher_logprobs=likely_logprobs(rng, length),
                teacher_rank=rng.integers(1, 50, length, dtype=np.int32),
                topk_ids=rng.integers(0, 50_000, (length, top_k), dtype=np.int32),
                topk_logprobs=topk_logprobs,
            )
        )
    return scores


def rollout_set(
    run: Path,
    num_shards: int = 1,
    run_id: str = "run-a",
    plan: str = "plan-a",
    raw_logprobs: bool = False,
    reward: bool = False,
) -> ShardSet:
    """The rollout shards of episode 3."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "stop_token_ids": [1]}
    about = {
        "run_id": run_id,
        "stage": "rollout",
        "scope": "3",
        "plan": plan,
        "policy_version": 3,
        "sampling": sampling,
    }
    schema = rollouts_schema(raw_logprobs, reward)
    return ShardSet(run / "episode=3" / "rollouts", num_shards, schema, about, ROLLOUT_COMMAND)


def score_set(run: Path, num_shards: int = 1, top_k: int = 4, run_id: str = "run-a") -> ShardSet:
    """The score shards of episode 3 by the teacher `main`."""
    about = {"run_id": run_id, "stage": "score", "scope": "3", "plan": "plan-s", "top_k": top_k}
    return ShardSet(
        run / "episode=3" / "scores" / "teacher=main", num_shards, scores_schema(top_k), about, SCORE_COMMAND
    )


def publish_rollouts(shards: ShardSet, shard: int, rows: Sequence[Rollout], rows_per_group: int = 256) -> bool:
    return shards.publish(shard, lambda: [rollout_batch(part, shards.schema) for part in _groups(rows, rows_per_group)])


def publish_scores(shards: ShardSet, shard: int, rows: Sequence[Score], rows_per_group: int = 64) -> bool:
    return shards.publish(shard, lambda: [score_batch(part, shards.schema) for part in _groups(rows, rows_per_group)])


def _groups(rows: Sequence, limit: int) -> list[Sequence]:
    starts = np.cumsum([0, *group_sizes(len(rows), SAMPLES_PER_PROMPT, limit)])
    return [rows[start:stop] for start, stop in pairwise(starts)]


def same_row(left: Rollout | Score, right: Rollout | Score) -> bool:
    """Whether two rows are equal bit for bit, types included."""
    return all(_same_value(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))


def _same_value(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return type(left) is type(right) and left == right


def same_rows(left: Sequence[Rollout | Score], right: Sequence[Rollout | Score]) -> bool:
    return len(left) == len(right) and all(map(same_row, left, right))


def file_names(folder: Path) -> list[str]:
    """Names of everything in a folder, temporaries included."""
    return sorted(entry.name for entry in folder.iterdir())
