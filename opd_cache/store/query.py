"""SQL over a run: DuckDB views on the published files, and conditions on rows in memory.

Never globs, which would pick up temporaries; never writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from opd_cache.errors import ConfigError, MissingInputError
from opd_cache.run_dir import SEAL, RunDir
from opd_cache.schema import EVALS, PROMPTS, ROLLOUTS, SCORES, STEPS, Column
from opd_cache.status import asked_teachers, evaluated_subjects, scored_parts
from opd_cache.store.publish import read_json

# What changes from one evaluation to the next, or with the rows that happen to lie beside.
UNSTABLE_NODES = {"SUBQUERY": "a subquery", "WINDOW": "a window function"}
SQL_TYPES = {
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint64": "UBIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
}


def connect(run_path: str | Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views prompts, rollouts, scores, steps and evals of one run.

    It reaches nothing outside the run directory, and its configuration is locked. Inside it, DuckDB lets COPY write:
    statements of others go through `query_rows`. Raises MissingInputError.
    """
    run = RunDir(Path(run_path).absolute())
    if not run.run_json.exists():
        raise MissingInputError(f"{run.path}: no run.json; this is no run directory.")
    connection = duckdb.connect(":memory:")
    for name, columns, selects in _views(run):
        connection.execute(f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join([_empty(columns), *selects])}")
    connection.execute(f"SET allowed_directories = [{_quoted(str(run.path) + '/')}]")
    return _locked(connection)


def _locked(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"SET {setting}")
    return connection


def query_rows(run_path: str | Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of one SELECT. Raises ConfigError with DuckDB's reason in one line."""
    try:
        connection = connect(run_path)
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise ConfigError(f"the query holds {len(statements)} statements; expected one SELECT.")
        # DuckDB lets COPY, EXPORT and ATTACH write into the directories that may be read.
        if statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError(f"the query is {statements[0].type.name}; expected SELECT, since a query only reads.")
        result = connection.execute(statements[0])
        return [column[0] for column in result.description], result.fetchall()
    except duckdb.Error as error:
        raise ConfigError(f"the query failed: {_reason(error)}") from error


def _reason(error: duckdb.Error) -> str:
    # After the reason come the statement again and a line of marks under it.
    return " ".join(str(error).split("\nLINE ")[0].split())


class RowCondition:
    """A true-or-false SQL condition over joined rows of Arrow tables in memory; it reaches nothing else.

    `schemas` name the tables: r (rollouts), s (scores, any number a rollout) and p (prompts). What it says of a row
    follows from that row alone. Raises ConfigError, naming the recipe's `key`, on anything else.
    """

    def __init__(self, sql: str, key: str, schemas: dict[str, pa.Schema]) -> None:
        self._said = f"{key} = {sql!r}"
        self._query = f"""
            SELECT bool_or(({sql}\n)) FROM r JOIN s ON s.row_number = r.row_number
            JOIN p ON p.prompt_index = r.prompt_index GROUP BY r.row_number ORDER BY r.row_number"""
        connection = duckdb.connect(":memory:")
        connection.execute("SET threads = 1")
        self._connection = _locked(connection)
        if fault := self._fault(sql):
            raise ConfigError(f"{self._said} {fault}; expected a condition on the columns of one row.")
        self({name: schema.empty_table() for name, schema in schemas.items()}, [])

    def __call__(self, tables: dict[str, pa.Table], rows_of_scores: list[int]) -> list[bool]:
        """Whether it holds for each rollout: for one of its scores, where it has several; null does not hold.

        rows_of_scores: which row of r each row of s belongs to.
        """
        numbers = {"r": pa.array(range(len(tables["r"])), pa.int64()), "s": pa.array(rows_of_scores, pa.int64())}
        try:
            for name, table in tables.items():
                numbered = table.append_column("row_number", numbers[name]) if name in numbers else table
                self._connection.register(name, numbered)
            result = self._connection.execute(self._query).fetchall()
        except duckdb.Error as error:
            raise ConfigError(f"{self._said} fails: {_reason(error)}") from error
        return [holds is True for (holds,) in result]

    def _fault(self, sql: str) -> str | None:
        (text,) = self._connection.execute("SELECT json_serialize_sql(?)", [f"SELECT ({sql}\n)"]).fetchall()[0]
        parsed = json.loads(text)
        if parsed["error"]:
            return f"is no SQL ({' '.join(parsed['error_message'].split())})"
        known = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        unstable = {name for (name,) in self._connection.execute(known).fetchall()}
        for node in _nodes(parsed):
            name = node.get("function_name") or (node.get("column_names") or [""])[-1]
            if name.lower() in unstable:
                return f"holds {name}, which may change from one reading to the next"
            if node.get("class") in UNSTABLE_NODES:
                return f"holds {UNSTABLE_NODES[node['class']]}"
        return None


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value, however deep it lies."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(item)


def render_table(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, column in enumerate(columns):
        is_number = rows and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row))
    Console(markup=False, emoji=False).print(table)


View = tuple[str, tuple[tuple[str, str], ...], list[str]]


def _views(run: RunDir) -> list[View]:
    rollouts, scores, steps = [], [], []
    for episode in run.episodes():
        target = run.episode(episode)
        rollouts += _sealed_select(target.rollouts, f"{episode}::INTEGER AS episode")
        for teacher, first in (
            (name, first) for name in asked_teachers(target) for first in scored_parts(target, name)
        ):
            constants = f"{episode}::INTEGER AS episode, {_quoted(teacher)} AS teacher, {first}::INTEGER AS first_token"
            scores += _sealed_select(target.scores(teacher, first), constants)
        if run.steps(episode).exists():
            steps.append(_select([run.steps(episode)], f"{episode}::INTEGER AS episode"))
    # A summary is published after its results.
    results = [run.evaluation(subject) / "results.parquet" for subject in evaluated_subjects(run)]
    return [
        ("prompts", _typed(PROMPTS), [_select([run.prompts], "")] if run.prompts.exists() else []),
        ("rollouts", (("episode", "INTEGER"), *_typed(ROLLOUTS)), rollouts),
        (
            "scores",
            (("episode", "INTEGER"), ("teacher", "VARCHAR"), ("first_token", "INTEGER"), *_typed(SCORES)),
            scores,
        ),
        ("steps", (("episode", "INTEGER"), *_typed(STEPS)), steps),
        ("evals", _typed(EVALS), [_select(results, "")] if results else []),
    ]


def _sealed_select(folder: Path, constants: str) -> list[str]:
    if not (folder / SEAL).exists():
        return []
    files = [folder / entry["file"] for entry in read_json(folder / SEAL)["shards"]]
    return [_select(files, constants)] if files else []


def _select(files: list[Path], constants: str) -> str:
    listed = ", ".join(_quoted(str(path)) for path in files)
    return f"SELECT {constants + ', ' if constants else ''}* FROM read_parquet([{listed}], hive_partitioning = false)"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _typed(columns: tuple[Column, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((c.name, _sql_type(str(c.type))) for c in columns)


def _sql_type(arrow_type: str) -> str:
    if arrow_type.startswith("list<"):
        return SQL_TYPES[arrow_type.split(": ")[1].split(" ")[0].rstrip(">")] + "[]"
    return SQL_TYPES[arrow_type]


def _empty(columns: tuple[tuple[str, str], ...]) -> str:
    return f"SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in columns)} WHERE false"
