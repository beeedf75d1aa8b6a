"""`status`: what a run has so far; `config`: what a recipe says."""

import json
from pathlib import Path

import click

from opd_cache.commands.running import console


@click.command()
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
        console().print(table)


@click.command()
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
