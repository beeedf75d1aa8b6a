"""SQL of `query`, of `connect` and of the page: it sees the views of the run, and nothing else of the machine."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import answered_or_refused, contents, examples
from fault_log import FaultLog, SilentError
from hypothesis import given
from hypothesis import strategies as st

import opd_cache

ROW = "hostile SQL"
MARKER = "marker-that-no-query-may-show"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files with the marker in them, and in the environment."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "a.csv").write_text(f"x\n{MARKER}\n")
    (folder / "a.json").write_text(f'{{"x": "{MARKER}"}}')
    pq.write_table(pa.table({"x": [MARKER]}), folder / "a.parquet")
    duckdb.connect(str(folder / "a.duckdb")).execute(f"CREATE TABLE t AS SELECT '{MARKER}' AS x").close()
    monkeypatch.setenv("DOORS_SECRET", MARKER)
    monkeypatch.chdir(folder)
    return folder


STATEMENTS = [
    "COPY (SELECT 1) TO '{out}'", "COPY rollouts TO '{out}' (FORMAT parquet)", "COPY t FROM '{csv}'", "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'", "ATTACH '{db}'", "ATTACH '{db}' AS other (READ_ONLY)", "ATTACH ':memory:'", "DETACH memory", "USE memory",
    "INSTALL httpfs", "LOAD httpfs", "LOAD '{out}'", "INSTALL '{out}'", "UPDATE EXTENSIONS", "FORCE INSTALL json",
    "SET enable_external_access = true", "SET GLOBAL enable_external_access = true", "RESET enable_external_access",
    "SET lock_configuration = false", "SET allowed_paths = ['/']", "SET allowed_directories = ['/']", "SET memory_limit = '1TB'",
    "SET autoinstall_known_extensions = true", "SET temp_directory = '{dir}'", "SET home_directory = '{dir}'",
    "SET secret_directory = '{dir}'", "SET log_query_path = '{out}'", "SET profiling_output = '{out}'",
    "SET enable_profiling = 'json'", "SET VARIABLE x = 1", "PRAGMA database_list", "PRAGMA enable_profiling",
    "PRAGMA import_database('{out}')", "PRAGMA enable_logging", "CALL enable_logging()", "CALL pragma_version()",
    "CREATE TABLE x AS SELECT 1", "CREATE VIEW x AS SELECT 1", "CREATE OR REPLACE VIEW rollouts AS SELECT 1", "CREATE MACRO x() AS 1",
    "CREATE SECRET (TYPE s3)", "CREATE TYPE x AS ENUM ('a')", "DROP VIEW rollouts", "DROP SCHEMA main CASCADE", "ALTER VIEW rollouts RENAME TO x",
    "INSERT INTO shards SELECT * FROM shards", "UPDATE shards SET rows = 0", "DELETE FROM shards", "TRUNCATE shards", "VACUUM", "CHECKPOINT",
    "BEGIN", "COMMIT", "PREPARE x AS SELECT 1", "EXECUTE x", "DEALLOCATE x", "LOAD", "EXPLAIN SELECT 1", "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "SELECT 1; SELECT 2", "SELECT 1; COPY (SELECT 1) TO '{out}'", "WITH x AS (COPY (SELECT 1) TO '{out}') SELECT 1",
    "WITH x AS (INSERT INTO shards SELECT * FROM shards RETURNING *) SELECT * FROM x", "", ";", "--", "/*", "\u0000", "SELECT", "\ufeffSELECT 1;;",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')", "FROM query_table('{csv}')", "SELECT * FROM sniff_csv('{csv}')",
    "SELECT getenv('DOORS_SECRET')", "SELECT getvariable('x')", "SELECT current_setting('home_directory') AS h", "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM '{csv}'", "SELECT * FROM '{json}'", "SELECT * FROM '{parquet}'", "SELECT * FROM read_csv('{csv}')", "SELECT * FROM read_text('{csv}')",
    "SELECT * FROM read_blob('{csv}')", "SELECT * FROM read_json('{json}')", "SELECT * FROM read_parquet('{parquet}')", "SELECT * FROM parquet_scan('{parquet}')",
    "SELECT * FROM parquet_metadata('{parquet}')", "SELECT * FROM parquet_schema('{parquet}')", "SELECT * FROM parquet_kv_metadata('{parquet}')",
    "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/proc/self/environ')", "SELECT * FROM read_text('a.csv')",
    "SELECT * FROM read_text('http://127.0.0.1:9/x')", "SELECT * FROM read_parquet('s3://bucket/x')", "SELECT * FROM 'https://example.com/a.csv'",
    "SELECT (SELECT content FROM read_text('{csv}'))", "SELECT * FROM rollouts, read_text('{csv}')", "FROM read_text(['{csv}'])",
    "SELECT * FROM read_text((SELECT '{csv}'))", "SELECT * FROM rollouts WHERE rollout_id IN (FROM read_text('{csv}') SELECT content)",
    "SELECT * FROM duckdb_secrets()", "SELECT * FROM duckdb_extensions()", "SELECT * FROM which_secret('x', 's3')", "SELECT * FROM pragma_database_size()",
    "SELECT * FROM duckdb_settings()", "SELECT write_log('{marker}')", "SELECT * FROM python_map_function()", "SELECT * FROM os", "SELECT * FROM contents",
]  # fmt: skip


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda text: text[:60] or "empty")
def test_no_statement_reaches_beyond_the_views(
    faults: FaultLog, shared_run: Path, outside: Path, statement: str
) -> None:
    names = {"out": outside / "written", "dir": outside, "csv": outside / "a.csv", "json": outside / "a.json"}
    names |= {"parquet": outside / "a.parquet", "db": outside / "a.duckdb", "marker": "x"}
    sql = statement
    for name, path in names.items():
        sql = sql.replace(f"{{{name}}}", str(path))
    before, run_before = contents(outside), contents(shared_run)
    with faults.trial(ROW, statement):
        ended = answered_or_refused("query", shared_run, sql, "--format", "json")
        if MARKER in ended.out + ended.err or "root:x:" in ended.out:
            raise SilentError(ended.out[:500])
        assert (contents(outside), contents(shared_run)) == (before, run_before)


def functions() -> list[tuple[str, str, int]]:
    """(kind, name, number of its arguments) of every function that DuckDB has."""
    sql = "SELECT DISTINCT function_type, function_name, least(len(parameters), 3) FROM duckdb_functions() WHERE NOT internal OR function_type IN ('scalar', 'table', 'pragma', 'macro', 'table_macro', 'aggregate') ORDER BY ALL"
    return [row for row in duckdb.connect().execute(sql).fetchall() if row[1].isidentifier()]


def test_no_function_of_duckdb_reads_a_file_or_the_environment(
    faults: FaultLog, shared_run: Path, outside: Path
) -> None:
    """Every function that there is, called with the name of a file and of a variable on a locked connection."""
    connection = opd_cache.connect(shared_run)
    before, called = contents(outside), 0
    for kind, name, count in functions():
        for value in (str(outside / "a.csv"), str(outside / "a.parquet"), "DOORS_SECRET", str(outside / "new")):
            arguments = ", ".join([f"'{value}'"] * max(1, count))
            sql = f"SELECT * FROM {name}({arguments})" if "table" in kind else f"SELECT {name}({arguments})"
            with faults.trial(ROW, "every function of DuckDB"):
                try:
                    found = str(connection.execute(sql).fetchmany(5))
                    called += 1
                except (duckdb.Error, OSError, ValueError):
                    found = ""
                if MARKER in found:
                    raise SilentError(f"{sql}: {found[:300]}")
    assert called > 200
    assert contents(outside) == before
    connection.close()


def test_a_connection_cannot_be_unlocked(faults: FaultLog, shared_run: Path, outside: Path) -> None:
    connection = opd_cache.connect(shared_run)
    for name, value in {
        "enable_external_access": "false", "lock_configuration": "true", "autoload_known_extensions": "false", "temp_directory": "",
        "python_enable_replacements": "false",
    }.items():  # fmt: skip
        found = connection.execute(f"SELECT current_setting('{name}')::VARCHAR").fetchone()
        assert found == (value,), name
    with faults.trial(ROW, "settings of a locked connection"):
        for sql in (
            "SET enable_external_access = true",
            "SET lock_configuration = false",
            "SET allowed_paths = ['/']",
            "LOAD httpfs",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)
        for sql in (
            f"SELECT * FROM '{outside}/a.csv'",
            f"ATTACH '{outside}/a.duckdb'",
            f"COPY (SELECT 1) TO '{outside}/x'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)
    connection.close()


@examples(100, 5000)
@given(
    words=st.lists(
        st.sampled_from(["SELECT", "*", "FROM", "WITH", "x", "AS", "(", ")", ",", ";", "COPY", "TO", "'a.csv'", "rollouts", "read_text", "query", "1", "UNION", "--", "/*", "*/", "$$", "\\", "'", '"', "\0", "\ud800", "é", "PIVOT", "ON", "VALUES", "LIMIT", "::", "[", "{"]),
        max_size=9,
    )
)  # fmt: skip
def test_any_words_are_a_query_or_one_line(faults: FaultLog, shared_run: Path, outside: Path, words: list[str]) -> None:
    with faults.trial(ROW, "any words"):
        ended = answered_or_refused("query", shared_run, " ".join(words), "--format", "json")
        if MARKER in ended.out:
            raise SilentError(ended.out)


HUNGRY = [
    "SELECT count(*) FROM range(10**15) a, range(10**15) b", "SELECT repeat('x', 10**10)",
    "SELECT list(a) FROM range(10**12) t(a)", "SELECT range(10**12)", "SELECT sum(hash(a.rollout_id || b.rollout_id)) FROM tokens a, tokens b, tokens c",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t", "SELECT regexp_matches(repeat('a', 30000), '(a*)*b')",
    "SELECT string_agg(repeat('x', 100000)) FROM range(10**6)", "SELECT list_sort(range(10**9))", f"SELECT {'(' * 3000}1{')' * 3000}",
    f"SELECT {'1+' * 20000}1", f"SELECT 1 {'UNION ALL SELECT 1 ' * 3000}",
]  # fmt: skip


@pytest.mark.parametrize("sql", HUNGRY, ids=lambda sql: sql[:50])
def test_a_hungry_query_ends_at_its_limits(faults: FaultLog, shared_run: Path, sql: str) -> None:
    with faults.trial(ROW, sql[:60]):
        answered_or_refused("query", shared_run, sql, "--timeout", "2", "--memory", "300MB", "--format", "json")
