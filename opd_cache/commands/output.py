"""Where the rows of a query go: to the terminal or into a file, in four formats."""

import contextlib
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from opd_cache.commands.query import FORMATS
from opd_cache.errors import ConfigError, visible
from opd_cache.store.publish import publish_file
from opd_cache.store.query import Answer

if TYPE_CHECKING:
    from rich.console import Console

WIDEST_TABLE = 10_000
Rows = Iterable[tuple[Any, ...]]


def format_of(chosen: str | None, output: Path | None) -> str:
    """The format that was asked for, else the one that the file's name ends in, else a table."""
    suffix = output.suffix.removeprefix(".") if output is not None else ""
    found = chosen or (suffix if suffix in FORMATS else "table")
    if found == "parquet" and output is None:
        raise ConfigError("--format parquet is for files; add --output FILE.")
    return found


def check_new_file(path: Path) -> None:
    """Raises ConfigError where the file is there already or cannot be."""
    if path.exists():
        raise ConfigError(f"{path}: exists and is not overwritten; choose another name.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder; make it, or choose another place for {path.name}.")


def write_answer(answer: Answer, format: str, output: Path | None) -> None:
    """All rows, to standard output or to a new file that is whole or not there."""
    if format != "table" and (repeated := _repeated(answer.columns)):
        raise ConfigError(f"the query gives two columns named {repeated!r}; rename one with AS.")
    if output is None:
        with _reader_may_leave():
            _write_text(answer, format, sys.stdout)
        return

    def write(file: BinaryIO) -> None:
        if format == "parquet":
            _write_parquet(answer, file)
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        _write_text(answer, format, text)
        text.flush()
        text.detach()

    write_new_file(output, write)


def write_new_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Publish a file that nobody else has made meanwhile. Raises ConfigError."""
    if not publish_file(path, write, lambda _: None):
        raise ConfigError(f"{path}: exists and is not overwritten; choose another name.")


def _repeated(columns: list[str]) -> str | None:
    return next((name for name in columns if columns.count(name) > 1), None)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """`| head` ends the output in silence."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python complains again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_text(answer: Answer, format: str, file: TextIO) -> None:
    writers = {"table": _write_table, "csv": _write_csv, "json": _write_json}
    writers[format](answer.columns, answer.rows(), file)


def _write_table(columns: list[str], rows: Rows, file: TextIO) -> None:
    from rich.table import Table

    kept, table = list(rows), Table()
    for index, column in enumerate(columns):
        is_number = bool(kept) and all(isinstance(row[index], int | float) for row in kept)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in kept:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else visible(str(value)) for value in row))
    text_console(file).print(table)


def text_console(file: TextIO) -> "Console":
    """For tables and texts. Brackets in them are just brackets, and only a terminal has an edge to fold at."""
    from rich.console import Console

    width = None if file.isatty() or "COLUMNS" in os.environ else WIDEST_TABLE
    return Console(file=file, markup=False, emoji=False, width=width)


def _write_csv(columns: list[str], rows: Rows, file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([json.dumps(v, default=str) if isinstance(v, list | dict) else v for v in row] for row in rows)


def _write_json(columns: list[str], rows: Rows, file: TextIO) -> None:
    for row in rows:
        named = dict(zip(columns, map(plain, row), strict=True))
        file.write(json.dumps(named, default=str, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON knows no infinities: they become the texts "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _write_parquet(answer: Answer, file: BinaryIO) -> None:
    import pyarrow.parquet as pq

    schema, batches = answer.batches()
    writer = pq.ParquetWriter(file, schema, compression="zstd")
    try:
        for batch in batches:
            writer.write_batch(batch)
    except BaseException:
        # Else its destructor would complete the file, by then closed.
        writer.is_open = False
        raise
    writer.close()
