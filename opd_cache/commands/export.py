"""opd-cache export."""

from collections.abc import Callable
from pathlib import Path

import click


@click.group()
def export() -> None:
    """Give a run to other programs: as a data set, as lines of JSON, as a database.

    Example: opd-cache export hf runs/quickstart quickstart-data
    """


def _rows_options(command: Callable) -> Callable:
    """What the exports of whole responses share."""
    for option in (
        click.option("--teacher", help="Only this teacher's scores; without it, one row a response and teacher."),
        click.option("--episodes", metavar="FIRST-LAST", help="Which, such as 0-4; without it, all that are sealed."),
        click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN"),
    ):
        command = option(command)
    return command


@export.command("hf")
@_rows_options
@click.argument("folder", type=click.Path(path_type=Path))
def export_hf(run_dir: Path, folder: Path, episodes: str | None, teacher: str | None) -> None:
    """Write a data set of all responses that `datasets.load_dataset(FOLDER)` reads, with a card.

    A new folder with Parquet files and a README.md: one row a response and teacher with texts, token ids and
    log-probs; a second configuration, steps, holds the optimizer steps. Publish it with `hf upload`.

    Example: opd-cache export hf runs/quickstart quickstart-data --episodes 10-11
    """
    from opd_cache.exports.hf import write_dataset
    from opd_cache.exports.rows import chosen_responses
    from opd_cache.logs import set_up_logging

    set_up_logging()
    responses = chosen_responses(run_dir, episodes, teacher)
    write_dataset(responses, folder)
    click.echo(
        f"{folder}: {responses.num_rows:,} rows. Read it with: datasets.load_dataset({str(folder)!r}, split='train')"
    )


@export.command("jsonl")
@_rows_options
@click.argument("file", type=click.Path(path_type=Path))
def export_jsonl(run_dir: Path, file: Path, episodes: str | None, teacher: str | None) -> None:
    """Write all responses into a new file, one JSON object a line.

    The columns are those of `export hf`; log-probs of −inf are the text "-inf".

    Example: opd-cache export jsonl runs/quickstart quickstart.jsonl --episodes 11
    """
    from opd_cache.commands.output import check_new_file, write_new_file
    from opd_cache.exports.jsonl import write_lines
    from opd_cache.exports.rows import chosen_responses
    from opd_cache.logs import set_up_logging

    set_up_logging()
    check_new_file(file)
    responses = chosen_responses(run_dir, episodes, teacher)
    write_new_file(file, lambda final: write_lines(responses, final))
    click.echo(f"{file}: {responses.num_rows:,} lines")


@export.command("duckdb")
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--partial", is_flag=True, help="Views on published shards of stages that are not sealed, too.")
def export_duckdb(run_dir: Path, file: Path, partial: bool) -> None:
    """Write a DuckDB database with the run's views, for any DuckDB client on this machine.

    It holds no data but the view `shards`: the views read the run's files, which must stay where they are.

    Example: opd-cache export duckdb runs/quickstart quickstart.duckdb
    """
    from opd_cache.commands.output import check_new_file, write_new_file
    from opd_cache.store.query import database_of_views

    check_new_file(file)
    with database_of_views(run_dir, partial) as (database, left_out):
        for line in left_out:
            click.echo(line, err=True)
        write_new_file(file, lambda final: final.write(database.read_bytes()))
