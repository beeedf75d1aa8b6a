"""opd-cache query."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cache.errors import ConfigError
from opd_cache.limits import DEFAULT_MEMORY, DEFAULT_TIMEOUT_S, Limits

if TYPE_CHECKING:
    from opd_cache.store.query import Runs

FORMATS = ("table", "csv", "json", "parquet")


@click.command(
    epilog="Views: prompts, teacher_prompts, vocab, rollouts, scores, samples, tokens, steps, evals, shards. "
    "One SELECT; it reads sealed files alone and writes nothing."
)
@click.argument("arguments", nargs=-1, metavar="[RUN] [SQL]")
@click.option("--run", "named", multiple=True, metavar="NAME=PATH", help="Several runs, each in a schema of its name.")
@click.option("--example", metavar="NAME", help="A ready query in place of SQL.")
@click.option("--examples", is_flag=True, help="List the ready queries; with --example, show its SQL.")
@click.option("--partial", is_flag=True, help="Read published shards of stages that are not sealed, too.")
@click.option("--format", type=click.Choice(FORMATS), help="Without it, what FILE ends in, or a table.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="A new file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row: --format json.")
@click.option("--memory", default=DEFAULT_MEMORY, show_default=True, help="What the query may use.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds it may take."
)
def query(
    arguments: tuple[str, ...],
    named: tuple[str, ...],
    example: str | None,
    examples: bool,
    partial: bool,
    format: str | None,
    output: Path | None,
    as_json: bool,
    memory: str,
    timeout: float,
) -> None:
    """Ask runs in SQL, down to every token.

    Example: opd-cache query runs/quickstart "select * from steps order by step desc limit 3"
    """
    if examples:
        _show_examples(example)
        return
    runs, sql = _asked(arguments, named, example)
    from opd_cache.commands.output import check_new_file, format_of, write_answer
    from opd_cache.store.query import open_query

    chosen = format_of("json" if as_json else format, output)
    if output is not None:
        check_new_file(output)
    with open_query(runs, sql, partial=partial, limits=Limits(memory, timeout)) as answer:
        for line in answer.left_out:
            click.echo(line, err=True)
        write_answer(answer, chosen, output)


def _show_examples(name: str | None) -> None:
    from opd_cache.queries import described_examples, example_sql

    if name is not None:
        click.echo(example_sql(name), nl=False)
        return
    described = described_examples()
    width = max(len(name) for name, _ in described)
    for name, answers in described:
        click.echo(f"{name:{width}}  {answers}")


def _asked(arguments: tuple[str, ...], named: tuple[str, ...], example: str | None) -> tuple["Runs", str]:
    """(the runs, the SQL) that the command line means."""
    expected = (0 if named else 1) + (0 if example else 1)
    if len(arguments) != expected:
        wanted = " ".join([*(() if named else ("RUN",)), *(() if example else ("SQL",))]) or "nothing"
        raise click.UsageError(f"found {len(arguments)} arguments, expected {wanted}.", click.get_current_context())
    if not example:
        return (named_runs(named) if named else arguments[0]), arguments[-1]
    from opd_cache.queries import example_sql

    if named:
        raise ConfigError(f"--example {example} asks one run; give it as RUN in place of --run.")
    return arguments[0], example_sql(example)


def named_runs(named: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH` of every --run. Raises ConfigError."""
    runs: dict[str, str] = {}
    for one in named:
        name, sign, path = one.partition("=")
        if not sign or not path:
            raise ConfigError(f"--run {one!r}: expected NAME=PATH, such as a=runs/quickstart.")
        if name in runs:
            raise ConfigError(f"--run {one!r}: the name {name!r} is given twice.")
        runs[name] = path
    return runs
