"""The command that says what a run will take, before it is begun."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from opd_cache.commands.running import EPILOG_RECIPE, console, load_recipe_arguments

if TYPE_CHECKING:
    from opd_cache.config import Recipe


@click.command(epilog=EPILOG_RECIPE)
@click.argument("recipe", nargs=-1, required=True, metavar="RECIPE... [key=value...]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(recipe: tuple[str, ...], as_json: bool) -> None:
    """Say what a run will take of disk and memory, and whether lengths, contexts and vocabularies go together.

    The same is asked when a run is begun: what cannot fit is refused, what is likely not to is warned of. Nothing is
    written. Exit status 2 when it would be refused.

    Example: opd-cache check gsm8k_qwen num_episodes=100
    """
    from opd_cache.capacity import check_space, space
    from opd_cache.run_dir import RunDir

    loaded = load_recipe_arguments(recipe)
    parts, free = space(loaded)
    warnings, memory = _of_models(loaded)
    if as_json:
        disk = {"parts": [asdict(part) for part in parts], "free": free}
        click.echo(
            json.dumps({"disk": disk, "memory": [asdict(one) for one in memory], "warnings": warnings}, indent=2)
        )
    else:
        _print(parts, free, warnings, memory)
    check_space(loaded, refuses=not RunDir(Path(loaded.run_dir)).run_json.exists())


def _of_models(recipe: "Recipe") -> tuple[list[str], list[Any]]:
    """(warnings, what each stage takes of memory). A run that is not there yet is opened in a folder of its own."""
    from dataclasses import replace

    from opd_cache.capacity import ALL_STAGES, check_models, memory_needed, memory_warning
    from opd_cache.run import open_run
    from opd_cache.run_dir import RunDir

    if recipe.task.name is not None and not Path(recipe.student.model).is_dir():
        return [f"task {recipe.task.name} is made when the run is begun: models and prompts are not known yet"], []
    with TemporaryDirectory() as folder:
        is_there = RunDir(Path(recipe.run_dir)).run_json.exists()
        run = open_run(recipe if is_there else replace(recipe, run_dir=folder))
        memory = memory_needed(run, ALL_STAGES)
        short = [memory_warning(one) for one in memory if one.bytes > one.free]
        return [*check_models(run, ALL_STAGES), *short], memory


def _print(parts: list[Any], free: int, warnings: list[str], memory: list[Any]) -> None:
    from rich.table import Table

    from opd_cache.capacity import gigabytes

    disk = Table(title=f"what the run still writes; {gigabytes(free)} are free there")
    for name in ("", "at least", "expected", "from"):
        disk.add_column(name, justify="right" if name in ("at least", "expected") else "left", overflow="fold")
    for part in parts:
        disk.add_row(part.name, gigabytes(part.least), gigabytes(part.expected), part.how)
    disk.add_row("all", *(gigabytes(sum(getattr(part, key) for part in parts)) for key in ("least", "expected")), "")
    needed = Table(title="memory of each stage here")
    for name in ("stage", "about", "free", "of"):
        needed.add_column(name, justify="right" if name in ("about", "free") else "left")
    for one in memory:
        needed.add_row(one.stage, gigabytes(one.bytes), gigabytes(one.free), one.of)
    out = console()
    out.print(disk)
    if memory:
        out.print(needed)
    for warning in warnings:
        out.print(f"warning: {warning}", soft_wrap=True, highlight=False)
