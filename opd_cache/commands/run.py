"""`run`: all stages of all episodes; `replay`: learning again from what a run has cached."""

import json
from pathlib import Path

import click

from opd_cache.commands.running import (
    EPILOG_RECIPE,
    console,
    load_recipe_arguments,
    quiet_libraries,
    stage_command,
    stoppable_command,
)


@click.command(epilog=EPILOG_RECIPE)
@stage_command
@click.option("--json", "as_json", is_flag=True, help="End with the status for programs instead of tables.")
def run(recipe: tuple[str, ...], as_json: bool) -> None:
    """Run all stages of all episodes on this machine.

    Run it again after any interruption: it goes on from the last published shard or checkpoint.

    Example: opd-cache run quickstart num_episodes=12
    """
    from opd_cache.capacity import ALL_STAGES, open_fitting_run
    from opd_cache.launch.environments import python_of
    from opd_cache.launch.local import SubprocessStages
    from opd_cache.pipeline import InlineStages, run_episodes
    from opd_cache.stall import stall_watch

    opened = open_fitting_run(load_recipe_arguments(recipe), ALL_STAGES)
    inline, commands = InlineStages(opened), SubprocessStages(recipe, opened.recipe.num_workers)

    def execute(stage: str, number: int) -> None:
        has_ranks = stage == "learn" and opened.recipe.learn.num_ranks > 1
        is_apart = opened.recipe.launcher == "subprocess" or has_ranks or python_of(opened.recipe, stage) is not None
        if is_apart:
            inline.make_room()
            commands(stage, number)  # whose processes watch themselves
        else:
            with stall_watch(opened.recipe.stall_timeout_s):
                inline(stage, number)

    run_episodes(opened, execute)
    if as_json:
        from opd_cache.status import run_status

        click.echo(json.dumps(run_status(opened.dir.path), indent=2))
    else:
        _print_summary(opened.dir.path)


def _print_summary(path: Path) -> None:
    from opd_cache.status import results_table, run_status

    status, out = run_status(path), console()
    out.print(results_table(status))
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in status["seconds"].items())
    tokens = max(1, status["response_tokens"])
    out.print(f"time: {seconds}")
    out.print(f"data: {status['response_tokens']:,} response tokens in {len(status['episodes'])} episodes")
    for name, size in status["bytes"].items():
        out.print(f"cache: {name} {size:,} bytes, {size / tokens:.1f} a response token")
    out.print("next:")
    for command in (
        f"opd-cache status {path}",
        f'opd-cache query {path} "select step, loss, reverse_kl, entropy from steps order by step desc limit 5"',
        f'opd-cache query {path} "select episode, avg(num_response_tokens) as tokens from rollouts group by episode order by episode"',
    ):
        out.print(f"  {command}", soft_wrap=True, highlight=False)


@click.command(
    epilog="What can be changed: learn.*, health.* and torch_threads. The teacher is not needed, nor the sampler."
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[learn.key=value...]")
@click.option("--into", type=click.Path(path_type=Path), required=True, help="The new run directory.")
@click.option("--episodes", metavar="FIRST-LAST", help="Which, such as 0-4; without it, all that are scored.")
@click.option("--json", "as_json", is_flag=True, help="The comparison for programs.")
@stoppable_command
def replay(run_dir: Path, overrides: tuple[str, ...], into: Path, episodes: str | None, as_json: bool) -> None:
    """Train again from a run's cached rollouts and scores alone, and compare.

    With nothing changed, the weights are the same bits. The same command again goes on after an interruption.

    Example: opd-cache replay runs/quickstart --episodes 0-1 --into runs/replay learn.loss.name=forward_kl_topk
    """
    from opd_cache.compare import comparison_table
    from opd_cache.logs import set_up_logging
    from opd_cache.replay import replay_run

    set_up_logging()
    quiet_libraries()
    comparison = replay_run(run_dir, into, episodes, overrides)
    if as_json:
        click.echo(json.dumps(comparison, indent=2))
    else:
        console().print(comparison_table(comparison))
