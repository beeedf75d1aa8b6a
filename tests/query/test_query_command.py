"""opd-cache query and export as a user gives them: formats, files, several runs, limits; and every ready query."""

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from helpers import edit_json, run_command

import opd_cache
from opd_cache.queries import described_examples, example_names, example_sql
from opd_cache.run import Run
from opd_cache.run_dir import SEAL
from opd_cache.store.query import query_rows

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture(scope="module")
def big_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made run of three episodes that all sample the same prompts, of four subjects."""
    path = tmp_path_factory.mktemp("big") / "run"
    command = [sys.executable, TOOLS / "make_big_run.py", path, "--tokens", "60000", "--episodes", "3", "--shards", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return path


def refused(*arguments: object, **options: object) -> str:
    done = run_command(*map(str, arguments), **options)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return line


# Formats and files

SQL = "SELECT episode, rollout_id, reverse_kl_sum, response_ids FROM samples JOIN rollouts USING (episode, rollout_id) ORDER BY ALL"


def test_every_format_holds_the_same_rows(finished_run: Run, tmp_path: Path) -> None:
    run = finished_run.dir.path
    columns, rows = query_rows(run, SQL)
    for name in ("rows.csv", "rows.json", "rows.parquet"):
        done = run_command("query", run, SQL, "--output", tmp_path / name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(tmp_path / "rows.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == columns
    assert [(int(a), b, float(c), json.loads(d)) for a, b, c, d in lines] == rows
    objects = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [tuple(one.values()) for one in objects] == rows
    assert [tuple(one.values()) for one in pq.read_table(tmp_path / "rows.parquet").to_pylist()] == rows
    assert run_command("query", run, SQL, "--format", "csv").stdout == (tmp_path / "rows.csv").read_text()
    assert run_command("query", run, SQL, "--json").stdout == (tmp_path / "rows.json").read_text()


def test_infinities_are_texts_in_json(finished_run: Run) -> None:
    sql = "SELECT '-inf'::FLOAT AS a, ['nan'::DOUBLE, 1.5] AS b, NULL AS c"
    done = run_command("query", finished_run.dir.path, sql, "--json")
    assert done.stdout == '{"a": "-inf", "b": ["nan", 1.5], "c": null}\n'


def test_a_table_shows_control_characters_as_escapes(finished_run: Run) -> None:
    done = run_command("query", finished_run.dir.path, "SELECT 'a' || chr(27) || '[31m' || chr(10) || 'b' AS x")
    assert "a\\x1b[31m\\nb" in done.stdout


def test_an_output_file_is_never_overwritten(finished_run: Run, tmp_path: Path) -> None:
    run, path = finished_run.dir.path, tmp_path / "rows.csv"
    path.write_text("mine")
    assert refused("query", run, "SELECT 1 AS a", "--output", path) == (
        f"ConfigError: {path}: exists and is not overwritten; choose another name."
    )
    assert refused("export", "duckdb", run, path) == (
        f"ConfigError: {path}: exists and is not overwritten; choose another name."
    )
    assert refused("query", run, "SELECT 1 AS a", "--output", tmp_path / "no" / "rows.csv") == (
        f"ConfigError: {tmp_path}/no: no such folder; make it, or choose another place for rows.csv."
    )
    assert refused("query", run, "SELECT 1 AS a", "--format", "parquet") == (
        "ConfigError: --format parquet is for files; add --output FILE."
    )
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", ["table", "csv", "json", "parquet"])
def test_a_failed_query_leaves_no_file(finished_run: Run, tmp_path: Path, format: str) -> None:
    # It fails when thousands of rows are written already.
    sql = "SELECT CASE WHEN range = 99999 THEN error('late') ELSE 1 END AS x FROM range(100000)"
    message = refused("query", finished_run.dir.path, sql, "--format", format, "--output", tmp_path / "rows")
    assert message == "ConfigError: the query failed: Invalid Input Error: late"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_the_output_in_silence(finished_run: Run) -> None:
    command = f"{sys.executable} -m opd_cache query {finished_run.dir.path} 'SELECT * FROM range(1000000)' --json"
    done = subprocess.run(["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('{"range": 0}\n', "")


# What is asked, of which runs


def test_two_runs_are_asked_together(finished_run: Run, big_run: Path) -> None:
    sql = "SELECT (SELECT count(*) FROM a.samples) AS a, (SELECT count(*) > 48 FROM b.samples) AS b"
    done = run_command("query", "--run", f"a={finished_run.dir.path}", "--run", f"b={big_run}", sql, "--json")
    assert json.loads(done.stdout) == {"a": 48, "b": True}


def test_command_lines_that_ask_nothing_are_refused(finished_run: Run) -> None:
    run, see = finished_run.dir.path, "See: opd-cache query --help"
    assert refused("query", run) == f"UsageError: found 1 arguments, expected RUN SQL. {see}"
    assert refused("query", run, "--example", "eos", "x") == f"UsageError: found 2 arguments, expected RUN. {see}"
    assert refused("query", "--run", f"a={run}") == f"UsageError: found 0 arguments, expected SQL. {see}"
    assert (
        refused("query", "--run", "a", "x") == "ConfigError: --run 'a': expected NAME=PATH, such as a=runs/quickstart."
    )
    known = ", ".join(example_names())
    assert refused("query", run, "--example", "no") == f"ConfigError: --example 'no' is unknown. Known: {known}."
    assert refused("query", "--run", f"a={run}", "--run", f"a={run}", "x").endswith("the name 'a' is given twice.")
    assert refused("query", "--run", f"a={run}", "--example", "eos") == (
        "ConfigError: --example eos asks one run; give it as RUN in place of --run."
    )


def test_what_is_left_out_is_one_line_on_stderr(finished_run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))
    (path / "episode=1/scores/teacher=main" / SEAL).unlink()
    done = run_command("query", path, "SELECT count(*) AS n FROM samples", "--json")
    assert (done.returncode, done.stdout) == (0, '{"n": 24}\n')
    assert done.stderr == "episode 1: scores of main not sealed (3 of 3 shards published), left out; --partial includes the published shards\n"  # fmt: skip
    done = run_command("query", path, "SELECT count(*) AS n FROM samples", "--json", "--partial")
    assert done.stdout == '{"n": 48}\n'
    done = run_command("query", path, "SELECT count(*) AS n FROM rollouts", "--json")
    assert (done.stdout, done.stderr) == ('{"n": 48}\n', "")


# Limits and locks


def test_no_thread_outlives_its_query(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that still held the connection when Python ends had DuckDB print pages about leaks.
    class SlowToEnd(threading.Timer):
        def run(self) -> None:
            super().run()
            time.sleep(0.2)

    monkeypatch.setattr(threading, "Timer", SlowToEnd)
    query_rows(finished_run.dir.path, "SELECT 1")
    assert not [thread for thread in threading.enumerate() if isinstance(thread, SlowToEnd)]


def test_time_and_memory_are_limited(finished_run: Run) -> None:
    run, start = finished_run.dir.path, time.monotonic()
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE (a.range * b.range) % 7 = 3"
    assert refused("query", run, endless, "--timeout", 1) == (
        "ConfigError: the query failed: it took more than 1 s. Narrow it, or raise --timeout."
    )
    assert time.monotonic() - start < 30
    message = refused("query", run, "SELECT array_agg(range::VARCHAR) FROM range(100000000)", "--memory", "200MB")
    assert message.startswith("ConfigError: the query failed: Out of Memory Error: ")
    assert message.endswith(" Narrow it, or raise --memory.")
    assert refused("query", run, "SELECT 1", "--memory", "much").startswith("ConfigError: memory = 'much': ")


def test_a_connection_is_locked(finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    connection = opd_cache.connect(finished_run.dir.path)
    secret = 1  # noqa: F841 - a variable that DuckDB would otherwise look up
    for sql in (
        "SET memory_limit = '100GB'", "RESET threads", "SET temp_directory = 'x'", "INSTALL httpfs", "LOAD httpfs",
        f"ATTACH '{tmp_path}/new.duckdb'", "COPY (SELECT 1) TO 'new.csv'", "SELECT * FROM read_text('/etc/passwd')",
        "EXPORT DATABASE 'new'", "CREATE SECRET s (TYPE s3)", f"SELECT * FROM '{finished_run.dir.run_json}'",
        "SELECT * FROM secret",
    ):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.execute(sql)
    assert list(tmp_path.iterdir()) == []


# Ready queries


def test_ready_queries_are_listed_with_what_they_answer() -> None:
    done = run_command("query", "--examples")
    assert len(done.stdout.splitlines()) == len(example_names()) >= 12
    for name, answers in described_examples():
        assert example_sql(name).startswith("-- ")
        assert len(answers) > 20
        assert f"{name}  " in done.stdout
        assert answers in done.stdout
    assert run_command("query", "--examples", "--example", "eos").stdout == example_sql("eos")


@pytest.mark.parametrize("name", example_names())
def test_every_ready_query_runs_on_a_real_run(name: str, finished_run: Run, big_run: Path) -> None:
    for run in (finished_run.dir.path, big_run):
        columns, rows = query_rows(run, example_sql(name))
        assert len(columns) >= 3
        assert rows or name in ("teacher-disagreement", "prompts-that-got-worse")


def asked(run: Path, name: str) -> list[dict]:
    columns, rows = query_rows(run, example_sql(name))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_ready_queries_agree_with_each_other_and_with_the_learner(finished_run: Run, big_run: Path) -> None:
    run = finished_run.dir.path
    total, tokens = query_rows(run, "SELECT sum(reverse_kl_sum), sum(num_scored_tokens) FROM samples")[1][0]
    by_position = asked(run, "reverse-kl-by-position")
    assert sum(row["reverse_kl"] * row["tokens"] for row in by_position) == pytest.approx(total, abs=1e-3)
    assert sum(row["tokens"] for row in by_position) == tokens
    assert by_position[0]["position"] == 0
    # The first step of an episode is taken by the policy that sampled it.
    first = query_rows(run, "SELECT reverse_kl FROM steps ORDER BY step LIMIT 1")[1][0][0]
    assert asked(run, "reverse-kl-by-episode")[0]["reverse_kl"] == pytest.approx(first, rel=0.5)
    (lowest,) = query_rows(run, "SELECT min(advantage) FROM tokens")[1][0]
    assert asked(run, "worst-tokens")[0]["advantage"] == lowest
    assert sum(row["share"] for row in asked(big_run, "reverse-kl-by-token")) < 1
    assert {row["domain"] for row in asked(big_run, "reverse-kl-by-domain")} == {
        "algebra", "geometry", "number theory", "words"
    }  # fmt: skip
    share = query_rows(big_run, "SELECT avg((finish_reason = 'length')::INT) FROM rollouts WHERE episode = 0")[1][0][0]
    assert asked(big_run, "truncated-share")[0]["truncated_share"] == share


def test_prompts_that_got_worse_are_those_whose_reverse_kl_rose(big_run: Path) -> None:
    sql = """SELECT prompt_index, episode, sum(reverse_kl_sum) / sum(num_scored_tokens) FROM samples GROUP BY ALL"""
    of = {(prompt, episode): mean for prompt, episode, mean in query_rows(big_run, sql)[1]}
    rises = {prompt: of[prompt, 2] - of[prompt, 0] for prompt, _ in of}
    expected = sorted((rise, prompt) for prompt, rise in rises.items() if rise > 0)[::-1][:20]
    found = asked(big_run, "prompts-that-got-worse")
    assert [row["prompt_index"] for row in found] == [prompt for _, prompt in expected]


def test_a_teacher_that_is_linked_twice_does_not_disagree_with_itself(finished_run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))
    for episode in ("episode=0", "episode=1"):
        twin = Path(shutil.copytree(path / episode / "scores/teacher=main", path / episode / "scores/teacher=twin"))
        for name in ("plan.json", SEAL):
            edit_json(twin / name, teacher="twin")
    rows = asked(path, "teacher-disagreement")
    assert [(row["teacher"], row["other"], row["difference"]) for row in rows] == [("main", "twin", 0.0)] * 2
    assert all(row["correlation"] == pytest.approx(1) for row in rows)


# The exported database


def test_an_exported_database_has_the_views_for_any_client(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.duckdb"
    done = run_command("export", "duckdb", finished_run.dir.path, path)
    assert (done.returncode, done.stderr) == (0, "")
    with duckdb.connect(path, read_only=True) as connection:
        for view in ("samples", "tokens", "rollouts", "shards"):
            count = f"SELECT count(*) FROM {view}"
            assert connection.execute(count).fetchall() == query_rows(finished_run.dir.path, count)[1]
        assert (
            connection.execute("SELECT max(response_text) FROM samples").fetchall()
            == (query_rows(finished_run.dir.path, "SELECT max(response_text) FROM samples")[1])
        )
    assert list(tmp_path.iterdir()) == [path]
