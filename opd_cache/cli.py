"""The command line. Heavy packages are imported inside the commands that need them, so that --help and status are quick."""

import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from opd_cache import __version__
from opd_cache.commands.check import check
from opd_cache.commands.export import export
from opd_cache.commands.gc import gc
from opd_cache.commands.import_ import import_rollouts
from opd_cache.commands.inspect import inspect
from opd_cache.commands.plot import plot
from opd_cache.commands.query import query
from opd_cache.commands.report import report, serve
from opd_cache.commands.slurm import cancel, submit
from opd_cache.commands.verify import repair, verify
from opd_cache.errors import FirstRankFailedError, OpdCacheError, TryAgainError, error_line
from opd_cache.shortage import shortage
from opd_cache.store.disk import disk_error

EPILOG_RECIPE = "RECIPE: YAML files and packaged names, merged left to right, then key=value."


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="opd-cache")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """On-policy distillation in three restartable stages joined by Parquet shards.

    \b
    opd-cache run quickstart                    a whole run on this machine
    opd-cache status runs/quickstart            what is done
    opd-cache query runs/quickstart "select avg(num_response_tokens) from rollouts"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _stage_command(command: Callable) -> Callable:
    """What commands that run stages of a recipe share."""
    argument = click.argument("recipe", nargs=-1, required=True, metavar="RECIPE... [key=value...]")
    return argument(_stoppable(command))


def _stoppable(command: Callable) -> Callable:
    """The command with an end by SIGTERM and SIGUSR1: one line and status 75."""

    @functools.wraps(command)
    def stoppable(**arguments: Any) -> None:
        from opd_cache.stop import stopping_signals

        with stopping_signals():
            command(**arguments)

    return stoppable


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


def load_recipe_arguments(recipe: tuple[str, ...], stage: str | None = None) -> Any:
    """The recipe of a stage that is about to run, in the environment that it wants."""
    from opd_cache.launch.environments import enter
    from opd_cache.logs import set_up_logging
    from opd_cache.recipes import load_recipe

    set_up_logging()
    loaded = load_recipe(recipe)
    if stage is not None:
        enter(loaded, stage, sys.argv[1:])
    quiet_libraries()
    return loaded


def quiet_libraries() -> None:
    """What other packages would print on import, and how their threads wait. Before they are imported."""
    # Two busy OpenMP threads on two cores spin against each other unless they sleep while waiting.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DistributedDataParallel warns of what we ask it for
    if importlib.util.find_spec("deepspeed"):
        import torch

        # transformers imports DeepSpeed wherever it is installed; where it has to guess, it says so on standard output.
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


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


@cli.command(epilog=EPILOG_RECIPE)
@_stage_command
@_share_options
def rollout(recipe: tuple[str, ...], episode: int, task: int | None, num_tasks: int | None, shard: int | None) -> None:
    """Sample responses with the student.

    Makes the missing shards of episode=N/rollouts and seals them when all are there.

    Example: opd-cache rollout quickstart --episode 0
    """
    share = _share(task, num_tasks, shard)
    with _inline_stages(recipe, "rollout") as stages:
        stages.rollout(episode, share=share)


@cli.command(epilog=EPILOG_RECIPE)
@_stage_command
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


@cli.command(epilog=EPILOG_RECIPE)
@_stage_command
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


@cli.command("eval", epilog=EPILOG_RECIPE)
@_stage_command
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


@cli.command(epilog=EPILOG_RECIPE)
@_stage_command
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


def _console() -> Any:
    """Standard output, for tables. Brackets in paths, names and texts are just brackets."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _print_summary(path: Path) -> None:
    from opd_cache.status import results_table, run_status

    status, console = run_status(path), _console()
    console.print(results_table(status))
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in status["seconds"].items())
    tokens = max(1, status["response_tokens"])
    console.print(f"time: {seconds}")
    console.print(f"data: {status['response_tokens']:,} response tokens in {len(status['episodes'])} episodes")
    for name, size in status["bytes"].items():
        console.print(f"cache: {name} {size:,} bytes, {size / tokens:.1f} a response token")
    console.print("next:")
    for command in (
        f"opd-cache status {path}",
        f'opd-cache query {path} "select step, loss, reverse_kl, entropy from steps order by step desc limit 5"',
        f'opd-cache query {path} "select episode, avg(num_response_tokens) as tokens from rollouts group by episode order by episode"',
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)


@cli.command(
    epilog="What can be changed: learn.*, health.* and torch_threads. The teacher is not needed, nor the sampler."
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[learn.key=value...]")
@click.option("--into", type=click.Path(path_type=Path), required=True, help="The new run directory.")
@click.option("--episodes", metavar="FIRST-LAST", help="Which, such as 0-4; without it, all that are scored.")
@click.option("--json", "as_json", is_flag=True, help="The comparison for programs.")
@_stoppable
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
        _console().print(comparison_table(comparison))


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run_dir: Path, as_json: bool) -> None:
    """Show what a run has so far: shards, policies, evaluations.

    Example: opd-cache status runs/quickstart --json
    """
    from opd_cache.run_dir import RunDir
    from opd_cache.status import run_status, status_tables

    found = run_status(run_dir)
    tables = status_tables(found)
    if RunDir(run_dir).submitted_recipe.exists():
        from opd_cache.launch.job_status import job_status, job_table

        found["slurm"] = job_status(run_dir)
        tables.append(job_table(found["slurm"]))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for table in tables:
        _console().print(table)


@cli.command()
@click.argument("recipe", nargs=-1, metavar="[RECIPE...] [key=value...]")
@click.option("--list", "list_recipes", is_flag=True, help="The packaged recipes.")
@click.option("--keys", is_flag=True, help="Every recipe key, its default and what it means.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
def config(recipe: tuple[str, ...], list_recipes: bool, keys: bool, as_json: bool) -> None:
    """Print the resolved recipe, the packaged recipes, or all recipe keys.

    Example: opd-cache config quickstart learn.learning_rate=1e-3
    """
    from opd_cache.config import describe_keys
    from opd_cache.recipes import load_recipe, packaged_recipes, recipe_json, recipe_yaml

    if list_recipes:
        for name, path in packaged_recipes().items():
            click.echo(f"{name}\t{path}")
    elif keys:
        for key, default, doc in describe_keys():
            click.echo(f"{key} = {default}\n    {doc}")
    else:
        loaded = load_recipe(recipe)
        click.echo(recipe_json(loaded) if as_json else recipe_yaml(loaded), nl=as_json)


COMMANDS = (
    check, query, plot, export, import_rollouts, inspect, report, serve, submit, cancel, verify, repair, gc,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Entry point: errors that a user can mend are one line and the status of their class."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli(prog_name="opd-cache", standalone_mode=False)
    except FirstRankFailedError as error:
        sys.exit(error.exit_status)
    except OpdCacheError as error:
        if debug:
            raise
        _stop(type(error).__name__, str(error), error.exit_status)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _stop(
            "UsageError", f"{error.format_message()} See: {context.command_path if context else 'opd-cache'} --help", 2
        )
    except Exception as error:
        if debug:
            raise
        name = error.filename if isinstance(error, OSError) else None
        if explained := disk_error(error, name or "a file of the run"):
            _stop(type(explained).__name__, str(explained), explained.exit_status)
        if (lacking := shortage(error)) is not None:
            message = f"{lacking}. Nothing unfinished was published; the same command goes on once there is more."
            _stop(TryAgainError.__name__, message, TryAgainError.exit_status)
        if isinstance(error, OSError) and name is not None:
            _stop(type(error).__name__, f"{name}: {error.strerror}.", 2)
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from what is published.", err=True)
        sys.exit(130)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def _stop(kind: str, message: str, status: int) -> NoReturn:
    """Print the error as one line and exit."""
    click.echo(error_line(kind, message), err=True)
    sys.exit(status)
