"""A run given to other programs: a data set that `datasets` loads, lines of JSON, in bounded memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from helpers import run_command
from peak_memory import peak_bytes

from opd_cache.run import Run
from opd_cache.schema import EXPORTED
from opd_cache.store.query import query_rows

TOOLS = Path(__file__).parent.parent.parent / "tools"
SQL = """
    SELECT s.episode, s.rollout_id, s.teacher, p.prompt_id, s.prompt_text, s.response_text, p.answer, s.finish_reason,
        r.prompt_ids, r.response_ids, r.sampling_logprobs, c.teacher_logprobs, c.teacher_rank, c.topk_ids, c.topk_logprobs
    FROM samples s JOIN rollouts r USING (episode, rollout_id) JOIN scores c USING (episode, rollout_id, teacher)
    JOIN prompts p ON p.prompt_index = s.prompt_index ORDER BY s.episode, s.rollout_id"""
NAMES = (
    "episode", "rollout_id", "teacher", "prompt_id", "prompt", "response", "answer", "finish_reason",
    "prompt_ids", "response_ids", "sampling_logprobs", "teacher_logprobs", "teacher_rank", "topk_ids", "topk_logprobs",
)  # fmt: skip


def as_queried(rows: list[dict[str, Any]]) -> list[tuple]:
    return sorted((tuple(row[name] for name in NAMES) for row in rows), key=lambda row: row[:2])


def refused(*arguments: object) -> str:
    done = run_command(*map(str, arguments))
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return line


def test_a_data_set_loads_with_the_real_library_and_holds_what_queries_say(finished_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    done = run_command("export", "hf", finished_run.dir.path, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: 48 rows. Read it with: datasets.load_dataset({str(folder)!r}, split='train')\n"
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == [column.name for column in EXPORTED]
    assert as_queried(loaded.to_list()) == query_rows(finished_run.dir.path, SQL)[1]
    assert all(len(row["topk_ids"]) == row["top_k"] * len(row["teacher_logprobs"]) for row in loaded)
    steps = datasets.load_dataset(str(folder), "steps", split="train", cache_dir=str(tmp_path / "cache"))
    sql = "SELECT episode, step, loss FROM steps ORDER BY step"
    assert [(r["episode"], r["step"], r["loss"]) for r in steps] == query_rows(finished_run.dir.path, sql)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]


def test_the_card_says_what_the_data_are(finished_run: Run, tmp_path: Path) -> None:
    assert run_command("export", "hf", finished_run.dir.path, tmp_path / "my-data").returncode == 0
    card = (tmp_path / "my-data/README.md").read_text()
    assert "48 rows of episodes 0 to 1" in card
    assert f"student: `{finished_run.recipe.student.model}`" in card
    assert f"teacher `main`: `{finished_run.recipe.teachers['main'].model}`" in card
    assert all(f"| `{column.name}` |" in card for column in EXPORTED)


def test_lines_of_json_are_the_rows_of_chosen_episodes(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    done = run_command("export", "jsonl", finished_run.dir.path, path, "--episodes", "1", "--teacher", "main")
    assert (done.returncode, done.stdout) == (0, f"{path}: 24 lines\n"), done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert as_queried(rows) == [row for row in query_rows(finished_run.dir.path, SQL)[1] if row[0] == 1]


def test_what_is_not_scored_is_exported_without_a_teacher(finished_run: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))
    shutil.rmtree(run / "episode=1/scores")
    assert run_command("export", "jsonl", run, tmp_path / "rows.jsonl").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["episode"], row["teacher"], bool(row["teacher_logprobs"])) for row in rows if row["response_ids"]} == {
        (0, "main", True), (1, None, False)
    }  # fmt: skip


def test_exports_that_cannot_be_are_one_line_and_leave_nothing(finished_run: Run, tmp_path: Path) -> None:
    run, taken = finished_run.dir.path, tmp_path / "taken"
    taken.mkdir()
    for kind in ("hf", "jsonl"):
        assert refused("export", kind, run, taken) == f"ConfigError: {taken}: exists and is not overwritten; choose another name."  # fmt: skip
    assert refused("export", "hf", run, tmp_path / "no/x").startswith(f"ConfigError: {tmp_path}/no: no such folder;")
    assert refused("export", "hf", run, tmp_path / "x", "--teacher", "who") == (
        "ConfigError: --teacher 'who' scored none of these episodes. Known: main."
    )
    assert refused("export", "jsonl", run, tmp_path / "x", "--episodes", "7").startswith("MissingInputError: ")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shard = next((copy / "episode=1/rollouts").glob("shard-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused("export", "hf", copy, tmp_path / "x").startswith("CorruptShardError: ")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "copy"}


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    peaks = []
    for tokens in (1_000_000, 5_000_000):
        run = tmp_path / str(tokens)
        command = [sys.executable, TOOLS / "make_big_run.py", run, "--tokens", str(tokens), "--episodes", "1", "--shards", str(tokens // 100_000)]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        export = [sys.executable, "-m", "opd_cache", "export", "hf", str(run), str(tmp_path / f"{tokens}-data")]
        peaks.append(peak_bytes(export))
        (first, *_) = sorted((tmp_path / f"{tokens}-data/responses").iterdir())
        assert pq.read_metadata(first).row_group(0).num_rows == 256
    print(f"{peaks[0] / 2**20:.0f} MiB, {peaks[1] / 2**20:.0f} MiB for five times the tokens")
    assert peaks[1] < peaks[0] * 1.2
