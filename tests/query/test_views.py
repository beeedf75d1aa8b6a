"""What the views hold, compared with the Parquet files read by other means, and what they leave out."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import edit_json

import opd_cache
from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.run_dir import SEAL
from opd_cache.schema import SAMPLES, SHARDS, TABLES, TOKENS, VIEWS
from opd_cache.store.publish import digest_file
from opd_cache.store.query import open_query, query_rows
from opd_cache.store.views import sql_types


@pytest.fixture
def run_copy(finished_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))


def one(run: Path, sql: str) -> tuple:
    (row,) = query_rows(run, sql)[1]
    return row


def rows_of(run: Path, pattern: str) -> list[dict]:
    return [row for path in sorted(run.glob(pattern)) for row in pq.read_table(path, partitioning=None).to_pylist()]


def token_rows(run: Path) -> list[dict]:
    """One dict a token of the whole run, by hand."""
    rollouts, scores = rows_of(run, "episode=*/rollouts/shard*"), rows_of(run, "episode=*/scores/teacher=main/shard*")
    found = []
    for rollout, score in zip(rollouts, scores, strict=True):
        assert rollout["rollout_id"] == score["rollout_id"]
        k = len(score["topk_ids"]) // max(1, len(rollout["response_ids"]))
        for place, token in enumerate(rollout["response_ids"]):
            found.append({
                "id": (rollout["rollout_id"], place), "token_id": token,
                "student": rollout["sampling_logprobs"][place], "teacher": score["teacher_logprobs"][place],
                "rank": score["teacher_rank"][place],
                "topk_ids": score["topk_ids"][place * k : (place + 1) * k],
                "topk": np.float64(score["topk_logprobs"][place * k : (place + 1) * k]),
            })  # fmt: skip
    return found


def test_a_connection_has_every_documented_view_with_its_columns(finished_run: Run) -> None:
    connection = opd_cache.connect(finished_run.dir.path)
    views = {name for (name,) in connection.execute("SHOW TABLES").fetchall()}
    assert views == set(TABLES) == set(VIEWS)
    for name, columns in (("samples", SAMPLES), ("tokens", TOKENS), ("shards", SHARDS)):
        described = connection.execute(f"DESCRIBE {name}").fetchall()
        assert [(column, kind) for column, kind, *_ in described] == sql_types(columns), name
    for name, columns in TABLES.items():
        described = {column for column, *_ in connection.execute(f"DESCRIBE {name}").fetchall()}
        assert {column.name for column in columns} <= described, name


def test_tokens_are_the_files_token_by_token(finished_run: Run) -> None:
    run = finished_run.dir.path
    sql = """SELECT rollout_id, position, token_id, sampling_logprob, student_logprob, teacher_logprob, advantage,
             teacher_rank, teacher_entropy, is_in_topk, topk_ids, topk_logprobs, teacher FROM tokens"""
    found = {(row[0], row[1]): row[2:] for row in query_rows(run, sql)[1]}
    expected = token_rows(run)
    assert found.keys() == {row["id"] for row in expected}
    assert len(expected) > 200
    for row in expected:
        token, sampling, student, teacher, advantage, rank, entropy, is_in, ids, logprobs, name = found[row["id"]]
        assert (token, sampling, student, teacher, rank) == (
            row["token_id"], row["student"], row["student"], row["teacher"], row["rank"]
        )  # fmt: skip
        assert advantage == pytest.approx(row["teacher"] - row["student"], abs=1e-5)
        assert (ids, logprobs, name) == (row["topk_ids"], row["topk"].tolist(), "main")
        assert is_in == (row["token_id"] in row["topk_ids"])
        listed = np.exp(row["topk"])
        tail = 1 - min(listed.sum(), np.exp(-1e-7))
        assert entropy == pytest.approx(-(listed * np.log(listed)).sum() - tail * np.log(tail), abs=1e-9)


def test_samples_are_sums_over_the_tokens(finished_run: Run) -> None:
    run = finished_run.dir.path
    gaps: dict[str, list[float]] = {}
    for row in token_rows(run):
        gaps.setdefault(row["id"][0], []).append(row["student"] - row["teacher"])
    lowest = {key: min(r["teacher"] for r in token_rows(run) if r["id"][0] == key) for key in gaps}
    sql = """SELECT rollout_id, reverse_kl_sum, reverse_kl_mean, teacher_logprob_min, num_scored_tokens,
             num_response_tokens FROM samples"""
    samples = query_rows(run, sql)[1]
    assert len(samples) == 48
    for rollout_id, total, mean, least, scored, length in samples:
        if not length:
            assert (total, mean, least, scored) == (None, None, None, 0)
            continue
        assert scored == length == len(gaps[rollout_id])
        assert total == pytest.approx(sum(gaps[rollout_id]), abs=1e-4)
        assert mean == pytest.approx(np.mean(gaps[rollout_id]), abs=1e-5)
        assert least == lowest[rollout_id]


def test_texts_are_those_of_the_vocabulary_and_of_the_prompts(finished_run: Run) -> None:
    run = finished_run.dir.path
    vocabulary = {row["token_id"]: row["text"] for row in rows_of(run, "vocab.parquet")}
    prompts = {row["prompt_index"]: row["text"] for row in rows_of(run, "prompts.parquet")}
    expected = {
        row["rollout_id"]: (prompts[row["prompt_index"]], "".join(vocabulary[i] for i in row["response_ids"]))
        for row in rows_of(run, "episode=*/rollouts/shard*")
    }
    found = query_rows(run, "SELECT rollout_id, prompt_text, response_text FROM samples")[1]
    assert {rollout_id: (prompt, response) for rollout_id, prompt, response in found} == expected
    for token_id, text in query_rows(run, "SELECT DISTINCT token_id, text FROM tokens")[1]:
        assert text == vocabulary[token_id]


def test_scalars_are_answered_without_reading_a_list(finished_run: Run) -> None:
    connection = opd_cache.connect(finished_run.dir.path)
    for sql in (
        "SELECT episode, count(*), avg(num_response_tokens), avg((finish_reason = 'length')::INT) FROM samples GROUP BY 1",
        "SELECT prompt_text FROM samples",
        "SELECT episode, teacher, sum(num_scored_tokens) FROM samples GROUP BY ALL",
    ):
        ((_, plan),) = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchall()
        assert "num_response_tokens" in plan or "prompt_index" in plan
        for column in ("response_ids", "sampling_logprobs", "teacher_logprobs", "topk_logprobs", "prompt_ids"):
            assert column not in plan, (sql, column)


def test_shards_say_what_the_seals_and_the_logs_say(finished_run: Run) -> None:
    run = finished_run.dir.path
    seal_path = run / "episode=1/scores/teacher=main" / SEAL
    seal = json.loads(seal_path.read_text())
    sql = """SELECT file, rows, tokens, bytes, sha256, plan, inputs, seconds > 0, host, engine, is_sealed FROM shards
             WHERE stage = 'score' AND episode = 1 ORDER BY shard"""
    found = query_rows(run, sql)[1]
    assert len(found) == len(seal["shards"]) == 3
    for row, entry in zip(found, seal["shards"], strict=True):
        assert row[:5] == (f"episode=1/scores/teacher=main/{entry['file']}", *(entry[k] for k in ("rows", "tokens", "bytes", "sha256")))  # fmt: skip
        assert row[4] == digest_file(run / row[0])
        assert row[5:8] == (seal["plan"], digest_file(run / "episode=1/rollouts" / SEAL), True)
        assert row[8] and "transformers" in row[9] and row[10] is True  # noqa: PT018
    assert one(run, "SELECT count(*) FROM shards WHERE episode IS NULL AND scope = 'policy=1-sampled'")[0] >= 2


def test_two_runs_lie_side_by_side(finished_run: Run, run_copy: Path) -> None:
    sql = """SELECT count(*), bool_and(a.reverse_kl_sum = b.reverse_kl_sum)
             FROM a.samples a JOIN "Other".samples b USING (episode, rollout_id)"""
    runs = {"a": finished_run.dir.path, "Other": run_copy}
    assert opd_cache.connect(runs).execute(sql).fetchall() == [(48, True)]
    assert query_rows(runs, sql)[1] == [(48, True)]
    for name in ("main", "a b", "", "information_schema", 'a"; drop'):
        with pytest.raises(ConfigError, match="cannot name a run"):
            opd_cache.connect({name: run_copy})


@pytest.fixture
def two_teachers(make_recipe: Callable[..., Recipe], run_copy: Path, task: Path) -> Path:
    """A run whose second teacher, the student itself, scored both episodes; the first up to a horizon that was grown."""
    other = f"teachers.other={{model: {task}/student, dtype: float32, device: cpu}}"
    for horizon in (3, 6):
        run = open_run(
            make_recipe(run_copy, other, "score.teacher=other", f"score.horizon={horizon}", "learn.teacher=main")
        )
        assert InlineStages(run).score(0)
    return run_copy


def test_a_rollout_has_one_row_a_teacher_and_a_grown_horizon_is_one_score(two_teachers: Path) -> None:
    assert one(two_teachers, "SELECT count(*) FROM scores WHERE teacher = 'other'") == (48,)
    sql = "SELECT teacher, count(*), count(DISTINCT rollout_id) FROM samples WHERE episode = 0 GROUP BY 1 ORDER BY 1"
    assert query_rows(two_teachers, sql)[1] == [("main", 24, 24), ("other", 24, 24)]
    sql = """SELECT bool_and(num_scored_tokens = least(6, num_response_tokens)),
             bool_or(num_scored_tokens = 6 AND num_response_tokens > 6) FROM samples WHERE teacher = 'other'"""
    assert one(two_teachers, sql) == (True, True)
    sql = """SELECT bool_and((teacher_logprob IS NULL) = (position >= 6)), bool_or(position >= 6),
             max(abs(advantage)), bool_and((topk_ids IS NULL) = (position >= 6))
             FROM tokens WHERE teacher = 'other'"""
    is_cut, is_longer, gap, is_topk_cut = one(two_teachers, sql)
    assert (is_cut, is_longer, is_topk_cut) == (True, True, True)
    # The student scored by itself, by another path through the same model.
    assert gap < 1e-3
    sql = """SELECT max(abs(reverse_kl_sum + summed)) FROM samples JOIN (
             SELECT rollout_id, teacher, sum(advantage) AS summed FROM tokens GROUP BY ALL) USING (rollout_id, teacher)"""
    assert one(two_teachers, sql)[0] < 1e-3


def test_raw_logprobs_are_the_students_where_sampling_cut_the_distribution(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(tmp_path / "run", "rollout.temperature=0.5", "eval.path=null"))
    stages = InlineStages(run)
    assert stages.rollout(0)
    assert stages.score(0)
    path = run.dir.path
    raw = {row["rollout_id"]: row["raw_logprobs"] for row in rows_of(path, "episode=0/rollouts/shard*")}
    found = query_rows(path, "SELECT rollout_id, position, student_logprob, sampling_logprob FROM tokens")[1]
    assert all(student == raw[rollout_id][place] for rollout_id, place, student, _ in found)
    assert any(student != sampling for *_, student, sampling in found)
    sql = """SELECT max(abs(reverse_kl_sum + summed)) FROM samples JOIN (
             SELECT rollout_id, sum(advantage) AS summed FROM tokens GROUP BY 1) USING (rollout_id)"""
    assert one(path, sql)[0] < 1e-3


def test_a_row_that_could_not_be_scored_has_tokens_without_a_teacher(run_copy: Path) -> None:
    shard = next((run_copy / "episode=0/scores/teacher=main").glob("shard-00000*"))
    table = pq.read_table(shard, partitioning=None)
    rows = table.to_pylist()
    rows[0] |= {"error": "too long", "num_response_tokens": 0, "teacher_logprobs": [], "teacher_rank": [], "topk_ids": [], "topk_logprobs": []}  # fmt: skip
    pq.write_table(table.from_pylist(rows, table.schema), shard)
    where = f"WHERE rollout_id = '{rows[0]['rollout_id']}'"
    assert one(run_copy, f"SELECT error, num_scored_tokens, reverse_kl_sum, num_response_tokens > 0 FROM samples {where}") == ("too long", 0, None, True)  # fmt: skip
    sql = f"SELECT count(*) > 0, count(teacher_logprob), count(advantage), count(topk_ids), count(teacher_entropy) FROM tokens {where}"
    assert one(run_copy, sql) == (True, 0, 0, 0, 0)


# What is not sealed


@pytest.fixture
def unsealed(run_copy: Path) -> Path:
    """Episode 1's scores lack their last shard and the seal."""
    folder = run_copy / "episode=1/scores/teacher=main"
    (folder / SEAL).unlink()
    sorted(folder.glob("shard-*"))[-1].unlink()
    (folder / f".{sorted(folder.glob('shard-*'))[0].name}.host.1.tmp").write_bytes(b"half")
    return run_copy


SAID = (
    "episode 1: scores of main not sealed (2 of 3 shards published), left out; --partial includes the published shards"
)


def test_an_unsealed_stage_is_left_out_and_said(unsealed: Path, caplog: pytest.LogCaptureFixture) -> None:
    for view, rows in (("rollouts", 48), ("scores", 24), ("samples", 24)):
        with open_query(unsealed, f"SELECT count(*) FROM {view}") as answer:
            assert answer.left_out == ([] if view == "rollouts" else [SAID])
            assert list(answer.rows()) == [(rows,)]
    with open_query(
        unsealed, "WITH t AS (SELECT max(position) AS p FROM main.tokens) SELECT * FROM steps, t"
    ) as answer:
        assert answer.left_out == [SAID]
    with caplog.at_level(logging.WARNING):
        opd_cache.connect(unsealed)
    assert caplog.messages == [SAID]


def test_partial_includes_the_published_shards(unsealed: Path) -> None:
    with open_query(unsealed, "SELECT count(*) FROM samples WHERE episode = 1", partial=True) as answer:
        assert answer.left_out == ["episode 1: scores of main not sealed, 2 of 3 shards published"]
        assert list(answer.rows()) == [(16,)]
    with open_query(unsealed, "SELECT count(*), count(sha256) FROM shards WHERE NOT is_sealed", partial=True) as answer:
        assert list(answer.rows()) == [(2, 0)]


def test_scores_of_other_rollouts_are_refused(run_copy: Path) -> None:
    seal = run_copy / "episode=0/rollouts" / SEAL
    edit_json(seal, note="other")
    with pytest.raises(MismatchError, match=r"episode=0/scores/teacher=main/_SEALED\.json: made from rollouts"):
        opd_cache.connect(run_copy)


@pytest.mark.parametrize("name", ["run.json", f"episode=0/rollouts/{SEAL}"])
def test_a_run_of_a_newer_schema_is_refused(run_copy: Path, name: str) -> None:
    edit_json(run_copy / name, schema_version=2)
    with pytest.raises(MismatchError, match="schema version 2, this opd-cache reads 1"):
        opd_cache.connect(run_copy)


def test_a_teachers_own_prompts_are_a_view(make_recipe: Callable[..., Recipe], run_copy: Path, task: Path) -> None:
    own = "{template: 'please {prompt}'}"
    hinted = f"teachers.hinted={{model: {task}/teacher, dtype: float32, device: cpu, prompt: {own}}}"
    run = open_run(make_recipe(run_copy, hinted, "score.teacher=hinted", "learn.teacher=main"))
    assert InlineStages(run).score(0)
    sql = "SELECT count(*), bool_and(t.text = 'please ' || p.text), min(teacher) FROM teacher_prompts t JOIN prompts p USING (prompt_index)"
    assert one(run_copy, sql) == (24, True, "hinted")
