"""The metadata of a large run without its tokens: plan, prompts, notes and seals are real, each shard holds one row."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from health import maker

from opd_cache.config import Recipe
from opd_cache.health.figures import rollout_figures, score_figures
from opd_cache.logs import StageProgress
from opd_cache.rollout.plan import plan_episode
from opd_cache.run_dir import RunDir
from opd_cache.stage import EVERYTHING, Figures, make_shards
from opd_cache.store.join import read_rollouts
from opd_cache.store.plans import RolloutPlan, publish_rollout_plan, publish_score_plan, rollout_shards, score_shards
from opd_cache.store.publish import digest_file
from opd_cache.store.rows import rollout_batch, score_batch

# 336 responses of some 300 tokens: 100,000 tokens a shard.
PROMPTS_PER_SHARD, SAMPLES, MAX_RESPONSE = 42, 8, 1024
TOKENS_PER_SHARD = 100_000
TEACHER = "main"


def make_run(path: Path, num_shards: int) -> dict[str, tuple[float, float]]:
    """A run whose first episode is sampled and scored, and whose second is not begun; (wall, CPU) seconds of the two
    stages, which publish, note and seal."""
    made, run = maker(), RunDir(path)
    shape = made.Shape(num_shards * TOKENS_PER_SHARD, 1, num_shards, SAMPLES, MAX_RESPONSE)
    recipe: Recipe = made.big_recipe(path, shape)
    count = recipe.rollout.prompts_per_episode = num_shards * PROMPTS_PER_SHARD
    recipe.rollout.prompts_per_shard, recipe.num_episodes = PROMPTS_PER_SHARD, 2
    made.publish_prompts(run, count)
    made.publish_vocab(run)
    run_id, target = made.publish_identity(run, recipe), run.episode(0)
    plan = new_plan(recipe, run_id, run)
    publish_rollout_plan(target, plan, "Choose another folder.")
    rollouts = rollout_shards(target, plan)

    def sampled(shard: int, progress: StageProgress, figures: Figures) -> Iterator[pa.RecordBatch]:
        rng = np.random.default_rng([0, shard])
        row = made.random_rollout(plan, rng, plan.shard_prompts(shard)[0], 0)
        figures.update(rollout_figures([row]))
        yield rollout_batch([row], rollouts.schema)

    start = _clocks()
    make_shards("rollout", run, target, plan, rollouts, EVERYTHING, sampled, {"engine": "random"})
    seconds = {"rollout": _since(start)}
    facts = {
        "teacher": TEACHER, "teacher_fingerprint": "random", "scorer": "hf", "dtype": "float32", "top_k": 0,
        "rollouts": rollouts.open_seal(),
    }  # fmt: skip
    publish_score_plan(target, plan, facts)
    scores = score_shards(target, plan, TEACHER)

    def scored(shard: int, progress: StageProgress, figures: Figures) -> Iterator[pa.RecordBatch]:
        rows = list(read_rollouts(rollouts, shard))
        found = [made.random_score(np.random.default_rng([1, shard]), row, 0.1) for row in rows]
        figures.update(score_figures(rows, found))
        yield score_batch(found, scores.schema)

    start = _clocks()
    facts = {"engine": "random", "dtype": "float32", "teacher": TEACHER}
    make_shards("score", run, target, plan, scores, EVERYTHING, scored, facts)
    return {**seconds, "score": _since(start)}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return wall - start[0], cpu - start[1]


def new_plan(recipe: Recipe, run_id: str, run: RunDir) -> RolloutPlan:
    """The plan of its first episode."""
    options = recipe.rollout
    return plan_episode(
        recipe, run_id, 0, 0, "random", "float32", digest_file(run.prompts), options.prompts_per_episode, [1]
    )
