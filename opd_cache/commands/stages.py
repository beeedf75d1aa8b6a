"""`rollout`, `score`, `learn` and `eval`: one stage of a recipe's run."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import click

from opd_cache.commands.running import EPILOG_RECIPE, load_recipe_arguments, stage_command


def _share_options(command: Callable) -> Callable:
    for option in (
        click.option("--shard", type=click.IntRange(min=0), help="Only this shard."),
        click.option(
            "--num-tasks",
            type=click.IntRange(min=1),
            help="Processes that share the missing shards; without it, the tasks of the Slurm array that this is in.",
        ),
        click.option(
            "--task",
            type=click.IntRange(min=0),
            help="Which of them this is: it takes shards with index % num_tasks == task.",
        ),
        click.option("--episode", type=click.IntRange(min=0), required=True, help="Episode number, from 0."),
    ):
        command = option(command)
    return command


def _share(task: int | None, num_tasks: int | None, shard: int | None) -> Any:
    from opd_cache.launch.slurm_tasks import array_share
    from opd_cache.stage import Share

    if task is None and num_tasks is None:
        task, num_tasks = array_share(os.environ) if shard is None else (0, 1)
    task, num_tasks = task or 0, num_tasks or 1
    if task >= num_tasks:
        raise click.UsageError(f"--task {task} must be below --num-tasks {num_tasks}.")
    return Share(task, num_tasks, shard)


@contextlib.contextmanager
def _inline_stages(recipe: tuple[str, ...], stage: str) -> Iterator[Any]:
    """A stage of a recipe's run in this process, which ends when the stage stalls."""
    loaded = load_recipe_arguments(recipe, stage)
    from opd_cache.capacity import open_fitting_run
    from opd_cache.pipeline import InlineStages
    from opd_cache.stall import stall_watch

    with stall_watch(loaded.stall_timeout_s):
        yield InlineStages(open_fitting_run(loaded, (stage,)))


@click.command(epilog=EPILOG_RECIPE)
@stage_command
@_share_options
def rollout(recipe: tuple[str, ...], episode: int, task: int | None, num_tasks: int | None, shard: int | None) -> None:
    """Sample responses with the student.

    Makes the missing shards of episode=N/rollouts and seals them when all are there.

    Example: opd-cache rollout quickstart --episode 0
    """
    share = _share(task, num_tasks, shard)
    with _inline_stages(recipe, "rollout") as stages:
        stages.rollout(episode, share=share)


@click.command(epilog=EPILOG_RECIPE)
@stage_command
@_share_options
@click.option("--teacher", help="Only this teacher of the recipe.")
def score(
    recipe: tuple[str, ...],
    episode: int,
    task: int | None,
    num_tasks: int | None,
    shard: int | None,
    teacher: str | None,
) -> None:
    """Give every sampled token its teacher's log-prob.

    Makes the missing shards of episode=N/scores/teacher=NAME and seals them when all are there.

    Example: opd-cache score quickstart --episode 0
    """
    share = _share(task, num_tasks, shard)
    chosen = () if teacher is None else (f"score.teacher={json.dumps(teacher)}",)
    with _inline_stages((*recipe, *chosen), "score") as stages:
        stages.score(episode, share=share)


@click.command(epilog=EPILOG_RECIPE)
@stage_command
@click.option("--episode", type=click.IntRange(min=0), required=True, help="Episode number, from 0.")
def learn(recipe: tuple[str, ...], episode: int) -> None:
    """Train the student on an episode's joined shards and publish its policy.

    With learn.num_ranks it starts so many processes on this machine; under torchrun or srun it is one of theirs.

    Example: opd-cache learn quickstart --episode 0
    """
    loaded = load_recipe_arguments(recipe, "learn")
    from opd_cache.learn.ranks import joined_ranks, rank_from_environment

    ranks = rank_from_environment()
    if ranks.world == 1 and loaded.learn.num_ranks > 1:
        from opd_cache.launch.ranks import run_ranks

        run_ranks(["learn", *recipe, "--episode", str(episode)], loaded.learn.num_ranks)
        return
    from opd_cache.capacity import open_fitting_run
    from opd_cache.pipeline import InlineStages
    from opd_cache.stall import stall_watch

    with stall_watch(loaded.stall_timeout_s), joined_ranks(ranks, loaded.learn.collective_timeout_s):
        InlineStages(ranks.from_first(lambda: open_fitting_run(loaded, ("learn",))), ranks).learn(episode)


@click.command("eval", epilog=EPILOG_RECIPE)
@stage_command
@click.option(
    "--policy-version",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The student after so many episodes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures for programs.")
def evaluate(recipe: tuple[str, ...], policy_version: int, as_json: bool) -> None:
    """Measure exact match and reverse KL on held-out prompts.

    Example: opd-cache eval quickstart --policy-version 10
    """
    with _inline_stages(recipe, "eval") as stages:
        stages.eval(policy_version)
    if as_json:
        from opd_cache.status import evaluation_summary

        click.echo(json.dumps(evaluation_summary(stages.run.dir, f"policy={policy_version}"), indent=2))
