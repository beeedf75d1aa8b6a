"""opd-cache plot."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cache.commands.query import named_runs
from opd_cache.errors import ConfigError

if TYPE_CHECKING:
    pass

KINDS = ("curve", "position", "tokens")
ENDINGS = (".png", ".svg", ".pdf")


@click.command(epilog="Needs matplotlib: pip install 'opd-cache[plot]'.")
@click.argument("arguments", nargs=-1, metavar="[RUN] curve|position|tokens")
@click.option("--run", "named", multiple=True, metavar="NAME=PATH", help="Several runs, under these names.")
@click.option("--teacher", help="As this teacher scored; without it, the first by name.")
@click.option(
    "--episode",
    type=click.IntRange(min=0),
    help="tokens: of this episode's responses; without it, the last scored one's.",
)
@click.option("--title", help="Above the figure; without it, none.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="A new .png, .svg or .pdf; without it, KIND.png.")  # fmt: skip
def plot(
    arguments: tuple[str, ...],
    named: tuple[str, ...],
    teacher: str | None,
    episode: int | None,
    title: str | None,
    output: Path | None,
) -> None:
    """Draw a figure of one run or of several.

    \b
    curve      held-out accuracy and reverse KL, policy by policy
    position   reverse KL by place in the response, episode by episode
    tokens     the tokens of the vocabulary that add most to the reverse KL

    Example: opd-cache plot runs/quickstart curve --output curve.svg
    """
    runs, kind = _asked(arguments, named)
    if episode is not None and kind != "tokens":
        raise ConfigError(f"--episode is for tokens; {kind} shows all episodes.")
    path = output or Path(f"{kind}.png")
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--output {path}: expected a name that ends in {', '.join(ENDINGS)}.")
    from opd_cache.commands.output import check_new_file, write_new_file
    from opd_cache.plots.data import Chosen

    check_new_file(path)
    try:
        from opd_cache.plots.draw import draw, save
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError(
            "plot needs matplotlib, which is not installed. Run: pip install 'opd-cache[plot]'"
        ) from error
    figure = draw(kind, [Chosen(name, run, teacher, episode) for name, run in runs.items()], title)
    write_new_file(path, lambda file: save(figure, file, path.suffix))
    click.echo(path)


def _asked(arguments: tuple[str, ...], named: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """(runs by name, kind) that the command line means."""
    expected = 1 if named else 2
    if len(arguments) != expected or arguments[-1] not in KINDS:
        wanted = f"{'' if named else 'RUN '}{'|'.join(KINDS)}"
        raise click.UsageError(
            f"found {' '.join(arguments) or 'nothing'}, expected {wanted}.", click.get_current_context()
        )
    return (named_runs(named) if named else {Path(arguments[0]).name: arguments[0]}), arguments[-1]
