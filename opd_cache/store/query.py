"""SQL over runs: DuckDB connections with views on sealed files, and conditions on rows in memory.

The views' own SQL is in views.py, which files they read in sealed.py. Never globs, which would pick up temporaries.
"""

import contextlib
import json
import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from opd_cache.config.values import NO_TEXT
from opd_cache.errors import ConfigError
from opd_cache.limits import DEFAULT_LIMITS, DEFAULT_MEMORY, Limits
from opd_cache.run_dir import RunDir
from opd_cache.schema import SHARDS
from opd_cache.store.sealed import LeftOut, RunFiles, find_files
from opd_cache.store.shard_notes import shard_rows
from opd_cache.store.views import quoted, sql_types, view_files, view_statements

log = logging.getLogger(__name__)
Connection = duckdb.DuckDBPyConnection
Runs = str | Path | Mapping[str, str | Path]

ROWS_PER_FETCH = 10_000
ROWS_PER_INSERT = 1_000
OLDEST_CLIENT = "v1.3.0"  # that opens an exported database
RUN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED_NAMES = {"main", "temp", "system", "information_schema", "pg_catalog"}
# What changes from one evaluation to the next, or with the rows that happen to lie beside.
UNSTABLE_NODES = {"SUBQUERY": "a subquery", "WINDOW": "a window function"}
# A WITH clause may hold a COPY, an INSERT, ...; a table function may run SQL that is given as text.
READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
TABLE_FUNCTIONS = {
    "range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "glob", "read_parquet", "parquet_scan",
    "parquet_metadata", "parquet_schema", "parquet_file_metadata", "parquet_kv_metadata", "read_csv", "read_json",
    "read_text", "read_blob", "duckdb_views", "duckdb_columns", "duckdb_functions", "duckdb_settings",
}  # fmt: skip


def connect(runs: Runs, *, partial: bool = False, memory: str = DEFAULT_MEMORY) -> Connection:
    """A DuckDB connection with the views of one run, or of several named ones in a schema each.

    Only files that a seal lists are read; with `partial`, also published shards of stages without one. What is left out
    is logged as a warning. No other file can be opened and no setting changed, but DuckDB lets a COPY replace a file that
    it may read: SQL of others goes through `open_query`.

    Raises MissingInputError, MismatchError (another schema version, scores of other rollouts), ConfigError.
    """
    connection, left_out = open_views(runs, partial, memory)
    for one in left_out:
        log.warning("%s", one.text)
    return connection


def open_views(runs: Runs, partial: bool, memory: str) -> tuple[Connection, list[LeftOut]]:
    """(the connection that `connect` gives, what its views leave out)."""
    named = {checked_name(name): path for name, path in runs.items()} if isinstance(runs, Mapping) else {"main": runs}
    found = {name: find_files(RunDir(Path(path).absolute()), partial) for name, path in named.items()}
    connection = duckdb.connect(":memory:")
    with _one_line("the views cannot be made"):
        for name, files in found.items():
            make_views(connection, files, name)
        _set_limits(connection, memory)
        allowed = sorted({str(path) for files in found.values() for path in view_files(files)})
        connection.execute(f"SET allowed_paths = [{', '.join(map(quoted, allowed))}]")
    left_out = [_named(one, name if len(found) > 1 else "") for name, files in found.items() for one in files.left_out]
    return _locked(connection), left_out


def checked_name(name: str) -> str:
    """The name of a run beside others. Raises ConfigError where SQL could not name it."""
    if not RUN_NAME.fullmatch(name) or name.lower() in RESERVED_NAMES:
        raise ConfigError(
            f"{name!r} cannot name a run: expected letters, digits and _, none of {', '.join(sorted(RESERVED_NAMES))}."
        )
    return name


def _named(one: LeftOut, run: str) -> LeftOut:
    return LeftOut(f"{run}: {one.text}", one.views) if run else one


def make_views(connection: Connection, found: RunFiles, schema: str) -> None:
    """Create all views of a run in a schema of the connection's database."""
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    for statement in view_statements(found, f'"{schema}"'):
        connection.execute(statement)
    # As JSON: registering an Arrow table loads pandas where it is installed, 0.3 s.
    structure = json.dumps([dict(sql_types(SHARDS))])
    rows = f"SELECT unnest(from_json(?, {quoted(structure)}), recursive := true)"
    connection.execute(f'CREATE TABLE "{schema}".shards AS {rows}', ["[]"])
    # 20,000 rows from one JSON text took 0.4 GB.
    shards = shard_rows(found)
    for start in range(0, len(shards), ROWS_PER_INSERT):
        batch = json.dumps(shards[start : start + ROWS_PER_INSERT])
        connection.execute(f'INSERT INTO "{schema}".shards {rows}', [batch])


def _set_limits(connection: Connection, memory: str) -> None:
    for setting in (
        "temp_directory = ''",  # without one to spill into, a query writes nothing at all
        "autoload_known_extensions = false",
        "python_enable_replacements = false",
        "parquet_metadata_cache = true",  # sealed files never change, and opening hundreds takes longer than a count
    ):
        connection.execute(f"SET {setting}")
    try:
        connection.execute(f"SET memory_limit = {quoted(memory)}")
    except duckdb.Error as error:
        raise ConfigError(f"memory = {memory!r}: {_reason(error)}. Expected a size such as 4GB.") from error


def _locked(connection: Connection) -> Connection:
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"SET {setting}")
    return connection


@dataclass
class Answer:
    """The result of one SELECT: to be read once, as rows or as Arrow batches."""

    columns: list[str]
    left_out: list[str]  # what is not sealed, of the views that the query names
    _connection: Connection = field(repr=False)
    _sql: str = field(repr=False)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        result = self._connection.execute(self._sql)
        while rows := result.fetchmany(ROWS_PER_FETCH):
            yield from rows

    def batches(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        reader = self._connection.sql(self._sql).to_arrow_reader(ROWS_PER_FETCH)
        return reader.schema, _batches_of(reader)


def _batches_of(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except OSError as error:
        # What Arrow makes of an error that DuckDB meets while it reads.
        raise duckdb.Error(str(error)) from error


@contextlib.contextmanager
def open_query(runs: Runs, sql: str, *, partial: bool = False, limits: Limits = DEFAULT_LIMITS) -> Iterator[Answer]:
    """The answer to one SELECT, which is stopped at its limits and can write nothing.

    Raises ConfigError with DuckDB's reason in one line, while the answer is read, too.
    """
    connection, left_out = open_views(runs, partial, limits.memory)
    try:
        with stopped_after(connection, limits.timeout_s):
            named = _checked_select(connection, sql)
            said = [one.text for one in left_out if named & one.views]
            columns = [column[0] for column in connection.execute(f"DESCRIBE {sql}").fetchall()]
            yield Answer(columns, said, connection, sql)
    finally:
        connection.close()


@contextlib.contextmanager
def stopped_after(connection: Connection, timeout_s: float) -> Iterator[None]:
    """Queries on this connection end by then. Raises ConfigError with DuckDB's reason, then and at any other error."""
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        connection.interrupt()

    timer = threading.Timer(timeout_s, stop)
    timer.daemon = True
    timer.start()
    try:
        with _one_line("the query failed", is_late, timeout_s):
            yield
    finally:
        timer.cancel()
        timer.join()  # a thread that still holds the connection when Python ends is a leak that DuckDB reports


def query_rows(runs: Runs, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of one SELECT. Raises ConfigError with DuckDB's reason in one line."""
    with open_query(runs, sql) as answer:
        return answer.columns, list(answer.rows())


@contextlib.contextmanager
def database_of_views(run_path: str | Path, partial: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """(a DuckDB file with the views of one run, what they leave out); the file is gone afterwards."""
    found = find_files(RunDir(Path(run_path).absolute()), partial)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.duckdb"
        with _one_line("the views cannot be made"):
            connection = duckdb.connect(str(path), config={"storage_compatibility_version": OLDEST_CLIENT})
            make_views(connection, found, "main")
            connection.close()
        yield path, [one.text for one in found.left_out]


def _checked_select(connection: Connection, sql: str) -> set[str]:
    """The names of the tables of one statement that only reads. Raises ConfigError on any other."""
    if NO_TEXT.search(sql):
        raise ConfigError("the query holds what is no UTF-8 text.")
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise ConfigError(f"the query holds {len(statements)} statements; expected one SELECT.")
    # DuckDB lets COPY write over a file that may be read.
    if (kind := _kind(statements[0])) != "SELECT":
        raise ConfigError(f"the query is {kind}; expected SELECT, since a query only reads.")
    parsed = _parsed(connection, statements[0].query)
    if parsed["error"]:
        raise ConfigError(f"the query failed: {' '.join(parsed['error_message'].split())}")
    for node in _nodes(parsed):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in READING_NODES:
            verb = kind.removesuffix("_NODE").removesuffix("_QUERY")
            raise ConfigError(f"the query holds {verb}; expected SELECT alone, since a query only reads.")
        if kind == "TABLE_FUNCTION" and (name := str(node["function"]["function_name"]).lower()) not in TABLE_FUNCTIONS:
            raise ConfigError(f"the query calls {name}(); known table functions: {', '.join(sorted(TABLE_FUNCTIONS))}.")
    return {node["table_name"].lower() for node in _nodes(parsed) if node.get("type") == "BASE_TABLE"}


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type.name)
    except ValueError:  # one that its Python package has no name for
        return "another statement"


def _parsed(connection: Connection, sql: str) -> dict[str, Any]:
    (text,) = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0]
    return json.loads(text)


@contextlib.contextmanager
def _one_line(what: str, is_late: threading.Event | None = None, timeout_s: float = 0) -> Iterator[None]:
    """Any error of DuckDB's as a ConfigError of one line."""
    try:
        yield
    except duckdb.Error as error:
        if is_late is not None and is_late.is_set():
            raise ConfigError(f"{what}: it took more than {timeout_s:g} s. Narrow it, or raise --timeout.") from error
        hint = ". Narrow it, or raise --memory." if "Out of Memory Error" in str(error) else ""
        raise ConfigError(f"{what}: {_reason(error)}{hint}") from error


def _reason(error: duckdb.Error) -> str:
    # After the reason come the statement again with a line of marks under it, or advice on settings that are locked.
    return " ".join(str(error).split("\nLINE ")[0].split("\nDatabase is launched")[0].split())


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
        parsed = _parsed(self._connection, f"SELECT ({sql}\n)")
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
