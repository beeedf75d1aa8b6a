"""The commands that speak with Slurm: submit and cancel."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from opd_cache.errors import ConfigError, OpdCacheError

FOLLOW_INTERVAL_S = 5.0


@click.command(epilog="CLUSTER: a YAML file or a packaged name; its keys are overridden by cluster.score.num_tasks=8.")
@click.argument("arguments", nargs=-1, required=True, metavar="RECIPE... CLUSTER [key=value...]")
@click.option("--dry-run", is_flag=True, help="Print the scripts and the sbatch commands; send and write nothing.")
@click.option("--episodes", metavar="FIRST-LAST", help="Which, such as 0-4; without it, all of the recipe.")
@click.option("--follow", is_flag=True, help="Then show how the jobs stand until none is left.")
@click.option("--json", "as_json", is_flag=True, help="Print what was sent for programs.")
def submit(arguments: tuple[str, ...], dry_run: bool, episodes: str | None, follow: bool, as_json: bool) -> None:
    """Send a run to Slurm: arrays for rollout and score, jobs for learn and eval, chained by their dependencies.

    Only what is missing is sent, and only what is not queued yet. The same command again mends a run whose jobs were
    lost, cancelled or failed.

    Example: opd-cache submit quickstart single_node
    """
    from opd_cache.capacity import ALL_STAGES, open_fitting_run
    from opd_cache.commands.running import quiet_libraries
    from opd_cache.launch.clusters import PREFIX, load_cluster
    from opd_cache.launch.submit import plan_submission, submission_rows
    from opd_cache.launch.submit import submit as send
    from opd_cache.logs import set_up_logging
    from opd_cache.recipes import load_recipe
    from opd_cache.replay import parse_episodes
    from opd_cache.run_dir import RunDir

    files = [argument for argument in arguments if "=" not in argument]
    if len(files) < 2:
        raise ConfigError(
            f"found {' '.join(files) or 'no file'}; expected RECIPE... CLUSTER, such as quickstart single_node."
        )
    about_cluster = [argument for argument in arguments if argument.startswith(PREFIX)]
    cluster = load_cluster(files[-1], about_cluster)
    rest = [argument for argument in arguments if argument != files[-1] and argument not in about_cluster]
    set_up_logging()
    recipe = load_recipe(rest)
    chosen = None if episodes is None else parse_episodes(episodes)
    run = RunDir(Path(recipe.run_dir).absolute())
    plan = plan_submission(recipe, run, cluster, chosen, dry_run)
    if dry_run:
        _print_dry(plan)
        return
    quiet_libraries()
    open_fitting_run(recipe, ALL_STAGES, runs_here=False)
    ids = send(plan, lambda line: click.echo(line, err=True))
    rows = submission_rows(plan, ids)
    if as_json:
        click.echo(json.dumps({"run_dir": str(run.path), "stages": rows}, indent=2))
    else:
        _print_rows(rows)
    if follow:
        follow_jobs(run.path)


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def cancel(run_dir: Path, as_json: bool) -> None:
    """Take back all queued and running jobs of a run. What is published stays; `opd-cache submit` goes on from it.

    Example: opd-cache cancel runs/quickstart
    """
    from opd_cache.launch.submit import cancel as take_back
    from opd_cache.run_dir import RunDir
    from opd_cache.status import read_identity

    run = RunDir(run_dir.absolute())
    read_identity(run)
    jobs = take_back(run)
    if as_json:
        click.echo(json.dumps({"cancelled": jobs}))
    else:
        click.echo(f"cancelled {', '.join(jobs)}" if jobs else f"{run_dir}: no job is queued.")


def follow_jobs(path: Path) -> None:
    """Show how a run's jobs stand until none is left. Raises OpdCacheError when the run is not complete then."""
    from rich.console import Console
    from rich.live import Live

    from opd_cache.launch.job_status import job_status, job_table

    with Live(console=Console(markup=False, emoji=False), auto_refresh=False) as live:
        while True:
            found = job_status(path)
            live.update(job_table(found), refresh=True)
            if not any(row["jobs"] for row in found["stages"]) and found["queue"] is None:
                break
            time.sleep(FOLLOW_INTERVAL_S)
    if not found["stages"]:
        click.echo(f"every stage is done. See: opd-cache status {path}")
    else:
        first = found["stages"][0]
        raise OpdCacheError(
            f"no job is left, but {first['stage']} {first['number']} is not complete. See: opd-cache status {path}"
        )


def _print_dry(plan: Any) -> None:
    sent = {step.work.stage for step in plan.steps if step.send}
    for script in plan.scripts:
        if script.stage in sent:
            edited = " (edited by hand, kept)" if script.is_edited else ""
            click.echo(f"==> {script.path}{edited}\n{script.text}")
    if plan.queue_fault is not None:
        click.echo(f"# The queue is taken for empty. {plan.queue_fault}")
    for step in plan.steps:
        if step.send:
            upstream = [f"<{stage} {number}>" for stage, number in step.work.after]
            click.echo(f"sbatch {' '.join(plan.arguments(step, upstream))}")


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=None if rows else "nothing to send: everything is done")
    for column in ("stage", "number", "missing shards", "sent tasks", "queued tasks", "job", "after"):
        table.add_column(column, overflow="fold")
    for row in rows:
        missing = f"{row['missing']} of {row['shards']}"
        cells = (row["sent_tasks"] or "-", row["queued_tasks"] or "-", ", ".join(row["jobs"]), ", ".join(row["after"]))
        table.add_row(row["stage"], str(row["number"]), missing, *cells)
    Console(markup=False, emoji=False).print(table)
