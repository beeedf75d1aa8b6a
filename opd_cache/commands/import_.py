"""opd-cache import."""

from pathlib import Path

import click

from opd_cache.errors import ConfigError

FORMATS = ("auto", "opd", "trl", "verl", "slime")


@click.command("import", epilog="RECIPE: YAML files and packaged names, merged left to right, then key=value.")
@click.argument("arguments", nargs=-1, required=True, metavar="RECIPE... [key=value...] FILE...")
@click.option("--episode", type=click.IntRange(min=0), required=True, help="Episode that they become, from 0.")
@click.option("--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="Whose rows; auto: by the names of their fields.")  # fmt: skip
def import_rollouts(arguments: tuple[str, ...], episode: int, format: str) -> None:
    """Take in rollouts that another program sampled, as an episode of the recipe's run.

    FILE is .jsonl, .json or .parquet with token ids (response_ids, and sampling_logprobs and loss_mask where known) or
    texts, a dump of TRL or verl, or a .pt of slime. Every row answers one of the run's prompts. A bad row is named by
    file and line, and nothing is written. Then go on with `opd-cache score` and `opd-cache learn`, or `opd-cache run`.

    Example: opd-cache import my_recipe.yaml rollouts.jsonl --episode 0
    """
    from opd_cache.commands.running import load_recipe_arguments
    from opd_cache.imports.formats import SUFFIXES
    from opd_cache.recipes import OVERRIDE

    files = [a for a in arguments if Path(a).suffix in SUFFIXES and not OVERRIDE.match(a)]
    recipe = tuple(argument for argument in arguments if argument not in files)
    if not files:
        raise ConfigError(f"found no file of rollouts among {' '.join(arguments)}; expected one that ends in {', '.join(SUFFIXES)}.")  # fmt: skip
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file.")
    loaded = load_recipe_arguments(recipe)
    from opd_cache.health.stage import check_stage
    from opd_cache.imports.stage import import_episode
    from opd_cache.run import open_run

    run = open_run(loaded)
    import_episode(run, episode, [Path(file) for file in files], format)
    check_stage(run.dir, run.recipe, "rollout", episode)
