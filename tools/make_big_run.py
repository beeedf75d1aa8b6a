"""Makes a sealed run of any size without a model: random numbers of a realistic shape, by the store's own writers.

    python tools/make_big_run.py RUN --tokens 20000000 [--episodes 10] [--shards 16] [--json]

Response lengths are log-normal and cut at --max-response; token ids are Zipf-like over a vocabulary of 151,936; a
student's log-probs are mostly near 0, and the teacher's differ by a noise that shrinks from episode to episode. One
teacher `main`, no top k, no policies: it is there to be queried, not to be learned from. Two cores make about 1 M
tokens a second.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opd_cache.config import Recipe
from opd_cache.health.figures import rollout_figures, score_figures
from opd_cache.health.stage import check_episode
from opd_cache.logs import StageProgress, set_up_logging
from opd_cache.prompts.intake import ROWS_PER_GROUP
from opd_cache.recipes import load_recipe
from opd_cache.rollout.plan import plan_episode
from opd_cache.run_dir import SCHEMA_VERSION, RunDir
from opd_cache.schema import PROMPTS, STEPS, VOCAB, arrow_schema
from opd_cache.stage import EVERYTHING, Figures, make_shards
from opd_cache.store.join import read_rollouts
from opd_cache.store.plans import RolloutPlan, publish_rollout_plan, publish_score_plan, rollout_shards, score_shards
from opd_cache.store.publish import digest_file, publish_json
from opd_cache.store.rows import group_limit, group_sizes, rollout_batch, score_batch
from opd_cache.store.shards import ShardSet, publish_table
from opd_cache.types import Float32Array, Int32Array, Rollout, Score

VOCABULARY, EOS, TEACHER = 151_936, 1, "main"
PROMPT_TOKENS, MEAN_RESPONSE, SPREAD = 80, 300, 0.6
SUBJECTS = ("algebra", "geometry", "number theory", "words")
STEPS_PER_EPISODE = 16


@dataclass(frozen=True)
class Shape:
    """How much of what."""

    tokens: int
    episodes: int
    shards: int  # of an episode
    samples: int
    max_response: int

    @property
    def prompts_per_episode(self) -> int:
        per_prompt = self.episodes * self.samples * mean_length(self.max_response)
        return max(self.shards, round(self.tokens / per_prompt))


def lengths(rng: np.random.Generator, size: int, longest: int) -> Int32Array:
    """Log-normal, at least 1; what would be longer than `longest` is cut there."""
    drawn = rng.lognormal(np.log(MEAN_RESPONSE) - SPREAD**2 / 2, SPREAD, size)
    return np.clip(drawn, 1, longest).astype(np.int32)


def mean_length(longest: int) -> float:
    return float(lengths(np.random.default_rng(0), 100_000, longest).mean())


def token_ids(rng: np.random.Generator, size: int) -> Int32Array:
    """Frequent ids are small, as in a vocabulary of byte pairs; none is the EOS."""
    return (2 + (VOCABULARY - 2) * rng.random(size) ** 4).astype(np.int32)


@functools.lru_cache(maxsize=16)
def prompt_ids(prompt: int) -> Int32Array:
    return token_ids(np.random.default_rng([1, prompt]), PROMPT_TOKENS)


def student_logprobs(rng: np.random.Generator, size: int) -> Float32Array:
    """Nine of ten tokens are nearly sure."""
    scale = np.where(rng.random(size) < 0.9, 0.05, 1.5)
    return (-rng.exponential(scale)).astype(np.float32)


def teacher_logprobs(rng: np.random.Generator, student: Float32Array, noise: float) -> Float32Array:
    """The student's with a skewed noise: a few tokens the teacher would never have sampled."""
    gap = rng.normal(0, 0.3 * noise, len(student)) - rng.exponential(noise, len(student)) ** 2
    return np.minimum(student + gap, -1e-6).astype(np.float32)


def make_run(path: Path, shape: Shape) -> dict[str, Any]:
    """Publish the whole run; what is there already stays. Returns how much it is."""
    run = RunDir(path)
    recipe = big_recipe(path, shape)
    publish_prompts(run, shape.prompts_per_episode)
    publish_vocab(run)
    run_id = publish_identity(run, recipe)
    for episode in range(shape.episodes):
        make_episode(run, recipe, run_id, episode, shape)
        check_episode(run, recipe, episode)
    return {"run_dir": str(path), "tokens": total_tokens(run, shape), "rows": shape.episodes * shape.prompts_per_episode * shape.samples}  # fmt: skip


def big_recipe(path: Path, shape: Shape) -> Recipe:
    prompts = shape.prompts_per_episode
    return load_recipe([
        "quickstart", f"run_dir={path}", "task.name=null", "eval.path=null", f"num_episodes={shape.episodes}",
        f"rollout.prompts_per_episode={prompts}", f"rollout.prompts_per_shard={-(-prompts // shape.shards)}",
        f"rollout.n_samples_per_prompt={shape.samples}", f"rollout.max_new_tokens={shape.max_response}",
        "score.top_k=0", "learn.loss.name=reverse_kl_pg",
    ])  # fmt: skip


def publish_prompts(run: RunDir, count: int) -> None:
    schema = arrow_schema(PROMPTS)
    columns = {
        "prompt_index": range(count),
        "prompt_id": [f"p{index}" for index in range(count)],
        "text": [f"Problem {index}: " + "what is it? " * 20 for index in range(count)],
        "num_prompt_tokens": [PROMPT_TOKENS] * count,
        "prompt_ids": [prompt_ids(index) for index in range(count)],
        "answer": [str(index) for index in range(count)],
        "fields": [json.dumps({"subject": SUBJECTS[index % len(SUBJECTS)]}) for index in range(count)],
    }
    batch = pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    groups = [batch.slice(start, ROWS_PER_GROUP) for start in range(0, count, ROWS_PER_GROUP)]
    publish_table(run.prompts, schema, lambda: groups, {"stage": "prompts", "config": {}})


def publish_vocab(run: RunDir) -> None:
    schema, texts = arrow_schema(VOCAB), [f" t{index}" for index in range(VOCABULARY)]
    arrays = [pa.array(range(VOCABULARY), pa.int32()), pa.array(texts, pa.string()), pa.array(texts, pa.string())]
    publish_table(run.vocab, schema, lambda: [pa.RecordBatch.from_arrays(arrays, schema=schema)], {"stage": "vocab"})


def publish_identity(run: RunDir, recipe: Recipe) -> str:
    run_id = "0" * 16
    content = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "seed": recipe.seed,
        "student": {"source": {}, "fingerprint": "random", "tokenizer": "random"},
        "prompts": {"config": {}, "sha256": digest_file(run.prompts)},
        "vocab": digest_file(run.vocab),
        "recipe": recipe.to_dict(),
    }
    publish_json(run.run_json, content, "the run", "Choose another folder.")
    return run_id


def make_episode(run: RunDir, recipe: Recipe, run_id: str, episode: int, shape: Shape) -> None:
    target, prompts = run.episode(episode), digest_file(run.prompts)
    plan = plan_episode(
        recipe, run_id, episode, episode, "random", "float32", prompts, recipe.rollout.prompts_per_episode, [EOS]
    )
    publish_rollout_plan(target, plan, "Choose another folder.")
    rollouts = rollout_shards(target, plan)
    make_shards(
        "rollout", run, target, plan, rollouts, EVERYTHING,
        lambda shard, *watched: rollout_batches(plan, rollouts, shard, *watched), {"engine": "random"},
    )  # fmt: skip
    facts = {
        "teacher": TEACHER, "teacher_fingerprint": "random", "scorer": "hf", "dtype": "float32", "top_k": 0,
        "rollouts": rollouts.open_seal(),
    }  # fmt: skip
    publish_score_plan(target, plan, facts)
    scores = score_shards(target, plan, TEACHER)
    noise = 0.1 + 0.5 / (episode + 1)
    make_shards(
        "score", run, target, plan, scores, EVERYTHING,
        lambda shard, *watched: scored_batches(plan, rollouts, scores, shard, noise, *watched),
        {"engine": "random", "dtype": "float32", "teacher": TEACHER},
    )  # fmt: skip
    publish_steps(run, episode, noise)


def rollout_batches(
    plan: RolloutPlan, shards: ShardSet, shard: int, progress: StageProgress, figures: Figures
) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng([int(plan.scope), shard])
    order = [(index, sample) for index in plan.shard_prompts(shard) for sample in range(plan.n_samples_per_prompt)]
    rows = (random_rollout(plan, rng, *place) for place in order)
    for size in row_group_sizes(plan, shard):
        group = list(islice(rows, size))
        progress.advance(len(group), sum(len(row.response_ids) for row in group))
        figures.update(rollout_figures(group))
        yield rollout_batch(group, shards.schema)


def row_group_sizes(plan: RolloutPlan, shard: int) -> list[int]:
    limit = group_limit(plan.sampling.max_new_tokens)
    return group_sizes(plan.shard_rollouts(shard), plan.n_samples_per_prompt, limit)


def random_rollout(plan: RolloutPlan, rng: np.random.Generator, prompt: int, sample: int) -> Rollout:
    longest = plan.sampling.max_new_tokens
    (size,) = lengths(rng, 1, longest)
    ids = token_ids(rng, size)
    if size < longest:
        ids[-1] = EOS
    return Rollout(
        rollout_id=f"{plan.scope}/{prompt}/{sample}",
        prompt_index=prompt,
        sample_index=sample,
        prompt_ids=prompt_ids(prompt),
        response_ids=ids,
        sampling_logprobs=student_logprobs(rng, size),
        finish_reason="stop" if size < longest else "length",
        policy_version=plan.policy_version,
    )


def scored_batches(
    plan: RolloutPlan,
    rollouts: ShardSet,
    scores: ShardSet,
    shard: int,
    noise: float,
    progress: StageProgress,
    figures: Figures,
) -> Iterator[pa.RecordBatch]:
    rng, rows = np.random.default_rng([int(plan.scope), shard, 1]), read_rollouts(rollouts, shard)
    for size in row_group_sizes(plan, shard):
        sampled = list(islice(rows, size))
        group = [random_score(rng, rollout, noise) for rollout in sampled]
        progress.advance(len(group), sum(len(score.teacher_logprobs) for score in group))
        figures.update(score_figures(sampled, group))
        yield score_batch(group, scores.schema)


def random_score(rng: np.random.Generator, rollout: Rollout, noise: float) -> Score:
    logprobs = teacher_logprobs(rng, rollout.sampling_logprobs, noise)
    ranks = 1 + rng.geometric(np.clip(np.exp(logprobs), 1e-3, 1)).astype(np.int32) - 1
    no_topk = np.zeros((len(logprobs), 0), np.int32)
    return Score(rollout.rollout_id, rollout.ids_hash, logprobs, ranks, no_topk, no_topk.astype(np.float32))


def publish_steps(run: RunDir, episode: int, noise: float) -> None:
    schema, size = arrow_schema(STEPS), STEPS_PER_EPISODE
    rng = np.random.default_rng([episode, 2])
    given = {
        "step": range(episode * size + 1, (episode + 1) * size + 1),
        "policy_version": [episode] * size,
        "tokens": [4096] * size,
        "ess": [1.0] * size,
    }
    arrays = [pa.array(given.get(f.name, noise * rng.random(size)), f.type, safe=False) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    publish_table(run.steps(episode), schema, lambda: [batch], {"stage": "learn", "episode": episode})


def total_tokens(run: RunDir, shape: Shape) -> int:
    seals = ((run.episode(episode).rollouts / "_SEALED.json").read_text() for episode in range(shape.episodes))
    return sum(json.loads(seal)["tokens"] for seal in seals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the new run directory")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="response tokens of all episodes, about")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--shards", type=int, default=16, help="of an episode, for rollouts and for scores")
    parser.add_argument("--samples", type=int, default=4, help="responses of a prompt")
    parser.add_argument("--max-response", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    set_up_logging()
    start = time.monotonic()
    shape = Shape(options.tokens, options.episodes, options.shards, options.samples, options.max_response)
    made = make_run(options.run, shape)
    if options.json:
        print(json.dumps(made))
    else:
        print(f"{made['run_dir']}: {made['tokens']:,} response tokens in {made['rows']:,} rollouts, {time.monotonic() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
