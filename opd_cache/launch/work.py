"""What a run still lacks, read from its files: the work list of a scheduler."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opd_cache.config import Recipe
from opd_cache.run_dir import COMPLETE, PLAN, RolloutSet, RunDir
from opd_cache.status import evaluation_summary
from opd_cache.store.plans import RolloutPlan, first_token_to_score, load_rollout_plan, rollout_shards, score_shards
from opd_cache.store.shards import ShardSet

Key = tuple[str, int]  # a stage and its episode; of an evaluation, its policy version


@dataclass(frozen=True)
class Work:
    """One stage of one episode: its shards and those that are missing. A stage without shards has one."""

    stage: str
    number: int
    num_shards: int
    missing: tuple[int, ...]  # of a stage whose shards only want their seal, all
    after: tuple[Key, ...] = ()  # the stages that feed it, if they are not done themselves

    @property
    def key(self) -> Key:
        return self.stage, self.number

    @property
    def is_done(self) -> bool:
        return not self.missing


def unfinished_work(recipe: Recipe, run: RunDir) -> list[Work]:
    """Every stage of every episode of the recipe, in an order in which they can be done."""
    works: list[Work] = []
    undone: set[Key] = set()
    for work in _all_work(recipe, run):
        after = tuple(key for key in work.after if key in undone)
        works.append(Work(work.stage, work.number, work.num_shards, work.missing, after))
        if not work.is_done:
            undone.add(work.key)
    return works


def _all_work(recipe: Recipe, run: RunDir) -> Iterator[Work]:
    has_evals = recipe.eval.path is not None
    if has_evals:
        yield _evaluation(run, 0)
    for episode in range(recipe.num_episodes):
        if (run.policy_after(episode) / COMPLETE).exists() and run.steps(episode).exists():
            for stage in ("rollout", "score", "learn"):
                yield Work(stage, episode, 1, ())
        else:
            yield from _episode(recipe, run, episode)
        if has_evals and recipe.eval_is_due(episode + 1):
            yield _evaluation(run, episode + 1)


def _evaluation(run: RunDir, version: int) -> Work:
    is_done = evaluation_summary(run, f"policy={version}") is not None
    return Work("eval", version, 1, () if is_done else (0,), (("learn", version - 1),))


def _episode(recipe: Recipe, run: RunDir, episode: int) -> Iterator[Work]:
    target = run.episode(episode)
    plan = load_rollout_plan(target) if target.plan.exists() else None
    options = recipe.rollout
    num_shards = plan.num_shards if plan else math.ceil(options.prompts_per_episode / options.prompts_per_shard)
    everything = tuple(range(num_shards))
    rollouts = everything if plan is None else _missing([rollout_shards(target, plan)])
    sampled_by = recipe.sampling_version(episode)
    yield Work("rollout", episode, num_shards, rollouts, (("learn", sampled_by - 1),))
    scores = everything if plan is None else _missing_scores(recipe, target, plan)
    yield Work("score", episode, num_shards, scores, (("rollout", episode),))
    yield Work("learn", episode, 1, (0,), (("score", episode), ("learn", episode - 1)))


def _missing(sets: Sequence[ShardSet]) -> tuple[int, ...]:
    shards = sorted({shard for one in sets for shard in one.missing()})
    if not shards and not all(one.is_sealed() for one in sets):
        return (0,)  # a task finds nothing missing, and seals
    return tuple(shards)


def _missing_scores(recipe: Recipe, target: RolloutSet, plan: RolloutPlan) -> tuple[int, ...]:
    sets = []
    for teacher in recipe.teachers_to_score():
        first = first_token_to_score(target, teacher, recipe.score.horizon)
        if not (target.scores(teacher, first) / PLAN).exists():
            return tuple(range(plan.num_shards))
        sets.append(score_shards(target, plan, teacher, first))
    return _missing(sets)
