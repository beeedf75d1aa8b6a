"""Figures of every stage, held against the recipe's thresholds: warnings that name a query, and a stop before the next stage."""

import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import edit_json, run_command

from opd_cache.config import HealthConfig, Recipe
from opd_cache.errors import ConfigError, UnhealthyError
from opd_cache.health.checks import CHECKS, findings, learn_means, rollout_shares, score_means
from opd_cache.health.figures import ends_in_a_loop, rollout_figures, score_figures
from opd_cache.health.stage import check_episode
from opd_cache.launch.clusters import load_cluster
from opd_cache.launch.submit import plan_submission
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.queries import example_sql
from opd_cache.run import Run, open_run
from opd_cache.run_dir import SEAL, RunDir
from opd_cache.stage import Share
from opd_cache.store.publish import read_json
from opd_cache.store.query import query_rows
from opd_cache.types import Rollout, Score

# Nothing at all is allowed.
STRICT = (
    "health.truncated_share=0", "health.empty_share=0", "health.eos_share=1", "health.loop_share=0",
    "health.unlikely_share=0", "health.advantage_high=-100", "health.ess=1", "health.entropy_ratio=1000",
)  # fmt: skip


def rollout(ids: list[int], finish_reason: str, logprobs: list[float] | None = None) -> Rollout:
    values = np.float32([-1.0] * len(ids) if logprobs is None else logprobs)
    return Rollout("0/0/0", 0, 0, np.int32([5]), np.int32(ids), values, finish_reason, 0)


def score(logprobs: list[float], error: str | None = None) -> Score:
    none = np.zeros((len(logprobs), 0), np.int32)
    return Score("0/0/0", 0, np.float32(logprobs), np.ones(len(logprobs), np.int32), none, none.astype("f4"), error)


# Figures


def test_a_loop_is_an_ending_that_stands_in_the_response_three_times() -> None:
    block = list(range(100, 140))
    assert not ends_in_a_loop(np.int32(block * 2))
    assert ends_in_a_loop(np.int32([7] * 50 + block * 3))
    assert ends_in_a_loop(np.int32([1, 2, 3] + [9] * 18))
    assert not ends_in_a_loop(np.int32([1, 2, 3] + [9] * 17))
    rng = random.Random(0)
    for _ in range(300):
        period = [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
        ids = ([rng.randint(0, 2) for _ in range(rng.randint(0, 40))] + period * 9)[: rng.randint(0, 90)]
        places = [start for start in range(len(ids) - 15) if ids[start : start + 16] == ids[-16:]]
        assert ends_in_a_loop(np.int32(ids)) == (len(places) >= 3)


def test_responses_are_counted_by_how_they_ended() -> None:
    rows = [rollout([1], "stop"), rollout([4, 1], "stop"), rollout([], "length"), rollout([9] * 30, "length")]
    assert rollout_shares(Counter(rollout_figures(rows))) == {
        "truncated_share": 0.5, "empty_share": 0.5, "eos_share": 0.5, "loop_share": 0.25
    }  # fmt: skip
    # One that ends its loop by itself is none.
    assert rollout_figures([rollout([9] * 30 + [1], "stop")])["looping_responses"] == 0


def test_unlikely_tokens_and_the_advantage_are_means_over_scored_tokens() -> None:
    rows = [rollout([4, 4, 4], "length", [-1, -2, -3]), rollout([4], "length", [-5.0])]
    sums = score_figures(rows, [score([-2.0, -20.0, -4.0]), score([], "too long")])
    assert score_means(sums) == pytest.approx({"unlikely_share": 1 / 3, "advantage": (-1 - 18 - 1) / 3})
    # From the third token on; a probability of 0 does not hide the others.
    assert score_means(score_figures(rows[:1], [score([-np.inf])], first_token=2)) == pytest.approx(
        {"unlikely_share": 1.0, "advantage": -97.0}
    )
    assert score_means({}) == rollout_shares({}) == {}


def test_learning_is_measured_by_its_steps_and_by_the_first_episodes() -> None:
    steps = [{"tokens": 5, "ess": 0.4, "entropy": 0.1}, {"tokens": 5, "ess": 0.6, "entropy": 0.3}]
    nothing = {"tokens": 0, "ess": 0.0, "entropy": 0.0}
    assert learn_means([*steps, nothing], [{"tokens": 5, "ess": 1.0, "entropy": 2.0}]) == pytest.approx(
        {"ess": 0.5, "entropy_ratio": 0.1}
    )
    assert learn_means([nothing], steps) == {}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("truncated_share", 0.5, 0.51), ("empty_share", 0.05, 0.06), ("eos_share", 0.01, 0.0),
        ("loop_share", 0.1, 0.11), ("unlikely_share", 0.02, 0.03), ("advantage_low", -4.0, -4.1),
        ("advantage_high", 0.1, 0.2), ("ess", 0.5, 0.4), ("entropy_ratio", 0.02, 0.01),
    ],
)  # fmt: skip
def test_a_figure_beyond_its_default_threshold_is_found(name: str, good: float, bad: float) -> None:
    check, health = CHECKS[name], HealthConfig()
    assert findings(check.stage, {check.figure: good}, health) == []
    (found,) = findings(check.stage, {check.figure: bad}, health)
    assert (found.name, found.value) == (name, bad)
    assert findings(check.stage, {check.figure: bad}, replace(health, **{name: None})) == []
    assert findings(check.stage, {}, health) == []


def test_every_threshold_has_a_check_and_every_check_a_query_that_shows_its_figure() -> None:
    assert [f.name for f in fields(HealthConfig)] == [*CHECKS, "fail_on"]
    for name, check in CHECKS.items():
        shown = "reverse_kl" if check.figure == "advantage" else check.figure
        if name != "eos_share":  # all but those that were cut
            assert re.search(rf"\b{shown}\b", example_sql(check.query)), name


# In a run


@pytest.fixture(scope="module")
def strict_run(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three episodes of short responses, of which everything is worth a warning."""
    path = tmp_path_factory.mktemp("strict") / "run"
    run = open_run(make_recipe(path, *STRICT, "num_episodes=3", "eval.path=null", "rollout.max_new_tokens=24"))
    stages = InlineStages(run)
    for episode in range(3):
        for stage in ("rollout", "score", "learn"):
            stages(stage, episode)
    return run


def status(run: Path) -> dict:
    return json.loads(run_command("status", run, "--json").stdout)


def test_warnings_are_kept_and_status_shows_them_with_their_command(strict_run: Run) -> None:
    path = strict_run.dir.path
    warnings = status(path)["warnings"]
    found = [(w["episode"], w["stage"], w["teacher"], w["name"]) for w in warnings]
    assert found == sorted(found, key=lambda one: (one[0], ("rollout", "score", "learn").index(one[1])))
    assert {
        (2, "rollout", None, "eos_share"), (2, "score", "main", "advantage_high"), (2, "learn", None, "ess"),
        (2, "learn", None, "entropy_ratio"),
    } <= set(found)  # fmt: skip
    table = run_command("status", path, env={**os.environ, "COLUMNS": "250"}).stdout
    assert f"see: opd-cache query {path} --example QUERY" in table
    for warning in warnings:
        assert warning["text"] in table
        assert warning["query"] in table
        assert warning["command"] == f"opd-cache query {path} --example {warning['query']}"


def test_a_warning_says_the_figure_that_its_query_shows(strict_run: Run) -> None:
    run = strict_run.dir.path
    for warning in status(run)["warnings"]:
        columns, rows = query_rows(run, example_sql(warning["query"]))
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        (row,) = (row for row in named if row["episode"] == warning["episode"])
        value = row.get(warning["name"])
        if warning["name"] == "eos_share":
            value = 1 - row["truncated_share"]
        elif warning["name"] == "advantage_high":
            value = -row["reverse_kl"]
        assert value == pytest.approx(warning["value"], rel=1e-4), warning


def test_the_ready_queries_count_as_the_checks_do(strict_run: Run, tmp_path: Path) -> None:
    """On a run with empty, looping and unlikely responses, made by hand in copies of real shards."""
    run = Path(shutil.copytree(strict_run.dir.path, tmp_path / "copy"))
    (shard,) = (run / "episode=0/rollouts").glob("shard-00000*")
    table = pq.read_table(shard, partitioning=None)
    rows = table.to_pylist()
    for row, ids, reason in ((rows[0], [1], "stop"), (rows[1], [9] * 20, "length"), (rows[2], [8, 7] * 12, "length")):
        row |= {"response_ids": ids, "num_response_tokens": len(ids), "finish_reason": reason}
    pq.write_table(table.from_pylist(rows, table.schema), shard)
    asked = {name: query_rows(run, example_sql(name)) for name in ("empty-responses", "loops")}
    empty, loops = (dict(zip(columns, rows[0], strict=True)) for columns, rows in asked.values())
    assert empty["empty_share"] == pytest.approx(1 / 24)
    assert (empty["first"], empty["empty_responses"]) == (rows[0]["rollout_id"], 1)
    assert (loops["looping"], loops["loop_share"]) == (2, pytest.approx(2 / 24))
    assert (loops["worst"], loops["times_in_it"]) in {(rows[1]["rollout_id"], 5), (rows[2]["rollout_id"], 5)}


def test_a_warning_is_said_once(strict_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = replace(strict_run, dir=RunDir(Path(shutil.copytree(strict_run.dir.path, tmp_path / "run"))))
    shutil.rmtree(copy.dir.logs / "health")
    check_episode(copy.dir, copy.recipe, 0)
    said = len(caplog.messages)
    assert said == 4
    assert all(" | " in line and f"See: opd-cache query {copy.dir.path} --example " in line for line in caplog.messages)
    check_episode(copy.dir, copy.recipe, 0)
    assert len(caplog.messages) == said
    # With other thresholds it is another thing to say.
    check_episode(copy.dir, replace(copy.recipe, health=replace(copy.recipe.health, ess=None)), 0)
    assert len(caplog.messages) == said


def test_a_run_whose_seals_have_no_figures_is_not_warned_of(strict_run: Run, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(strict_run.dir.path, tmp_path / "run")))
    seal = copy.episode(0).rollouts / SEAL
    shards = read_json(seal)["shards"]
    assert all(entry.pop("figures") for entry in shards)
    edit_json(seal, shards=shards)
    shutil.rmtree(copy.logs / "health")
    check_episode(copy, strict_run.recipe, 0)
    assert [w["stage"] for w in status(copy.path)["warnings"]] == ["score", "learn"]


# fail_on

STOPS = ("health.truncated_share=0", "health.fail_on=[truncated_share]", "eval.path=null")


def stopped(stages: InlineStages, stage: str, episode: int = 0) -> str:
    with pytest.raises(UnhealthyError) as raised:
        stages(stage, episode)
    return str(raised.value)


def test_fail_on_stops_a_run_before_its_next_stage_with_status_3(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = ("run", str(task / "recipe.yaml"), f"run_dir={path}", *STOPS)
    done = run_command(*command)
    assert done.returncode == 3, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("UnhealthyError: episode 0 rollout: truncated_share = ")
    assert line.endswith(
        f"See: opd-cache query {path} --example truncated-share. The run stops before its next stage; to go on, change the threshold or take it out of health.fail_on."
    )
    # The same again finds the same, in processes of their own, too.
    done = run_command(*command, "launcher=subprocess", "num_workers=2")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        "StageUnhealthyError: rollout 0 stopped the run by health.fail_on; see above."
    )
    assert not (path / "episode=0/scores").exists()


def test_no_stage_starts_and_none_is_submitted_behind_one_that_fails(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "run", *STOPS)
    stages = InlineStages(open_run(recipe))
    for stage in ("rollout", "rollout", "score"):
        assert stopped(stages, stage).startswith("episode 0 rollout: truncated_share = ")
    assert not (tmp_path / "run/episode=0/scores").exists()
    shutil.rmtree(tmp_path / "run/logs/health")
    with pytest.raises(UnhealthyError, match="episode 0 rollout: truncated_share"):
        plan_submission(recipe, RunDir(tmp_path / "run"), load_cluster("single_node"), is_dry=True)
    assert not (tmp_path / "run/logs/health").exists()
    recipe.health.fail_on = None
    assert stages.score(0)


def test_only_the_task_that_seals_the_stage_looks_at_it(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    stages = InlineStages(open_run(make_recipe(tmp_path / "run", *STOPS)))
    assert not stages.rollout(0, share=Share(0, 2))
    assert stages.run.dir.health_notes() == []
    with pytest.raises(UnhealthyError):
        stages.rollout(0, share=Share(1, 2))
    assert len(stages.run.dir.health_notes()) == 1


def test_learning_that_fails_its_check_stops_the_next_episode(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(tmp_path / "run", "eval.path=null", "health.ess=1", "health.fail_on=[ess]"))
    for _ in range(2):
        with pytest.raises(UnhealthyError, match="episode 0 learn: ess = "):
            run_episodes(run, InlineStages(run))
    assert run.has_policy(1)
    assert not run.dir.episode(1).rollouts.exists()


def test_a_stop_by_health_is_not_queued_again() -> None:
    script = (Path(__file__).parent.parent.parent / "opd_cache/launch/job.sh").read_text()
    (condition,) = re.findall(r"if \[\[ (\(.*?) && -z", script)
    for status, warned, expected in ((75, "", 0), (1, "1", 0), (3, "1", 1), (3, "", 1), (2, "", 1)):
        script = f"status={status} warned={warned}; [[ {condition} ]]"
        ended = subprocess.run(["bash", "-c", script]).returncode
        assert ended == expected, (status, warned)


def test_names_that_are_no_checks_are_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"health.fail_on\[0\] = 'loops' is unknown. Known: truncated_share, "):
        make_recipe(tmp_path, "health.fail_on=[loops]")
    with pytest.raises(ConfigError, match=r"health.truncated_share = 2.0 is too large"):
        make_recipe(tmp_path, "health.truncated_share=2.0")
