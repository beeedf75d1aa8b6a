"""What looks at all shards of a run, one question each: made ready outside the clock, then asked."""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scale_run import TEACHER, new_plan

from opd_cache.learn.inputs import open_source
from opd_cache.learn.losses import resolve_loss
from opd_cache.learn.plan import plan_learning
from opd_cache.learn.stream import Source, merged
from opd_cache.recipes import recipe_yaml, stored_recipe
from opd_cache.run_dir import RunDir
from opd_cache.status import read_identity, run_status
from opd_cache.store.gc import dead_temporaries
from opd_cache.store.join import shards_from
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, publish_rollout_plan, rollout_shards, score_shards
from opd_cache.store.sealed import find_files
from opd_cache.store.shards import ShardSet
from opd_cache.verify.walk import checks_of

Ask = Callable[[], Any]


class Asked:
    """A made run, opened."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.run, self.scratch = RunDir(path), scratch
        identity = read_identity(self.run)
        self.run_id = identity["run_id"]
        self.recipe = stored_recipe(identity["recipe"], [], str(self.run.run_json))
        self.target = self.run.episode(0)

    @cached_property
    def plan(self) -> RolloutPlan:
        return load_rollout_plan(self.target)

    @cached_property
    def rollouts(self) -> ShardSet:
        return rollout_shards(self.target, self.plan)

    @cached_property
    def scores(self) -> ShardSet:
        return score_shards(self.target, self.plan, TEACHER)

    @cached_property
    def source(self) -> Source:
        return open_source(self.recipe, self.target, 0, resolve_loss(self.recipe.learn.loss))[0]


def plan_an_episode(asked: Asked) -> Ask:
    numbers = itertools.count()

    def ask() -> None:
        target = RunDir(asked.scratch / str(next(numbers))).episode(0)
        publish_rollout_plan(target, new_plan(asked.recipe, asked.run_id, asked.run), "")

    return ask


def seal(shards: ShardSet) -> Ask:
    def ask() -> None:
        shards.seal_path.unlink()
        assert shards.seal()

    return ask


def dry_submission(asked: Asked) -> Ask:
    from opd_cache.launch.clusters import load_cluster
    from opd_cache.launch.submit import plan_submission

    os.environ["PATH"] = ""  # the queue is taken for empty: Slurm's own time is in submit.py
    cluster = load_cluster("single_node", ["cluster.defaults.num_tasks=100000"])

    def ask() -> None:
        plan = plan_submission(asked.recipe, asked.run, cluster, is_dry=True)
        assert [plan.arguments(step, ()) for step in plan.steps if step.send]

    return ask


def work_of_many_episodes(asked: Asked) -> Ask:
    """An episode for every shard, so that what looks at pairs of episodes shows."""
    from opd_cache.launch.work import unfinished_work

    recipe = replace(asked.recipe, num_episodes=asked.plan.num_shards)
    recipe.rollout.prompts_per_episode = recipe.rollout.prompts_per_shard
    return lambda: unfinished_work(recipe, RunDir(asked.scratch))


def status_of_lost_jobs(asked: Asked) -> Ask:
    """Every shard of the second episode was a task that is gone from the queue."""
    from opd_cache.launch.job_status import job_status

    os.environ["PATH"] = ""
    count, run = asked.plan.num_shards, asked.run
    run.submitted_recipe.parent.mkdir(exist_ok=True)
    run.submitted_recipe.write_text(recipe_yaml(asked.recipe))
    jobs = [
        {
            "job": str(job),
            "stage": stage,
            "number": 1,
            "width": count,
            "tasks": f"0-{count - 1}",
            "after": [],
            "time": 0,
        }
        for job, stage in enumerate(("rollout", "score"))
    ]
    run.submitted_jobs.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return lambda: job_status(run.path)


def order_of_learning(asked: Asked) -> Ask:
    source = asked.source

    def ask() -> None:
        plan = plan_learning(asked.recipe, 0, source.num_rows, [source.rows_per_prompt], False, 0)
        sizes = plan.batch_sizes()
        assert sum(sizes) == source.num_rows
        assert sum(plan.learning_rate(step, asked.recipe.learn) for step in range(len(sizes))) >= 0

    return ask


def query(asked: Asked, sql: str | None) -> Ask:
    import opd_cache

    def ask() -> None:
        with opd_cache.connect(str(asked.run.path)) as connection:
            if sql:
                connection.execute(sql).fetchall()

    return ask


def _all(items: Iterable[object]) -> int:
    return sum(1 for _ in items)


QUESTIONS: dict[str, Callable[[Asked], Ask]] = {
    "plan an episode": plan_an_episode,
    "read a plan": lambda asked: lambda: load_rollout_plan(asked.target),
    "list missing shards": lambda asked: asked.rollouts.missing,
    "seal rollouts": lambda asked: seal(asked.rollouts),
    "open a seal": lambda asked: asked.rollouts.open_seal,
    "status": lambda asked: lambda: run_status(asked.run.path),
    "submit --dry-run": dry_submission,
    "work list of as many episodes": work_of_many_episodes,
    "status of lost Slurm tasks": status_of_lost_jobs,
    "plan the join": lambda asked: (
        lambda: open_source(asked.recipe, asked.target, 0, resolve_loss(asked.recipe.learn.loss))
    ),
    "order of learning": order_of_learning,
    "order with one replayed episode": lambda asked: lambda: _all(merged([asked.source, asked.source])),
    "resume at the last shard": lambda asked: lambda: list(shards_from(asked.rollouts, asked.rollouts.num_shards - 1)),
    "gc": lambda asked: lambda: list(dead_temporaries(asked.run.path, 3600.0)),
    "list what verify checks": lambda asked: lambda: _all(checks_of(asked.run)),
    "find files to query": lambda asked: lambda: find_files(asked.run),
    "open a query": lambda asked: query(asked, None),
    "count rows in SQL": lambda asked: query(asked, "SELECT count(*) FROM rollouts"),
}
