"""learn.keep_policies: what it gives up goes, what is still needed stays, and a run with removed policies is whole."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_verified, complete, data_files, edit_json, opd_cache_command, run_command

from opd_cache.config import Recipe
from opd_cache.errors import MissingInputError
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.retention import removable_policies, remove_policies
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir
from opd_cache.status import run_status
from opd_cache.verify.run import verify_run

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
LAST = "learn.keep_policies.last=1"
NOT_BEST = "learn.keep_policies.best=false"
POLICY = "episode=0/policy/model.safetensors"


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))


def versions(path: Path, recipe: Recipe) -> list[int]:
    return [old.version for old in removable_policies(RunDir(path), recipe)]


def test_a_run_removes_old_policies_as_it_goes_and_stays_whole(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    rules = (LAST, "learn.keep_policies.every=2", NOT_BEST)
    recipe = make_recipe(tmp_path / "run", "num_episodes=4", "eval.every_episodes=3", *rules)
    run = complete(recipe)
    assert [run.is_removed(version) for version in range(1, 5)] == [True, False, True, False]
    assert_verified(run.dir.path)
    learned = [entry["learn"] for entry in run_status(run.dir.path)["episodes"]]
    assert [(one["done"], one["removed"]) for one in learned] == [(True, True), (True, False)] * 2
    before = data_files(run.dir.path)
    again = open_run(recipe)
    run_episodes(again, InlineStages(again))
    assert data_files(run.dir.path) == before
    whole = complete(make_recipe(tmp_path / "whole", "num_episodes=4", "eval.every_episodes=3"))
    kept = {name: data for name, data in data_files(whole.dir.path).items() if name in before}
    assert kept == before
    assert {name.split("/")[0] for name in data_files(whole.dir.path) if name not in before} == {
        "episode=0",
        "episode=2",
    }


def test_by_default_and_while_something_needs_it_every_policy_stays(
    copied: Path, make_recipe: Callable[..., Recipe]
) -> None:
    assert versions(copied, make_recipe(copied)) == []
    assert versions(copied, make_recipe(copied, LAST, NOT_BEST)) == [1]
    assert versions(copied, make_recipe(copied, LAST, NOT_BEST, "learn.keep_policies.every=1")) == []
    first = copied / "episode=0/policy"
    for needed_by in ("teachers.old.model=policy:1", f"learn.reference={first}", f"teachers.old.model={first}"):
        others = ("learn.teacher=main",) if "old" in needed_by else ()
        assert versions(copied, make_recipe(copied, LAST, NOT_BEST, needed_by, *others)) == [], needed_by
    moving = ("teachers.old.model=policy:current", "learn.teacher=main")
    assert versions(copied, make_recipe(copied, LAST, NOT_BEST, *moving)) == []
    shutil.move(copied / "evals/policy=1", copied / "evaluated")
    assert versions(copied, make_recipe(copied, LAST, NOT_BEST)) == []
    shutil.move(copied / "evaluated", copied / "evals/policy=1")
    shutil.rmtree(copied / "episode=1/policy")
    assert versions(copied, make_recipe(copied, LAST, NOT_BEST)) == []


def test_the_best_evaluated_policy_stays(copied: Path, make_recipe: Callable[..., Recipe]) -> None:
    for better, gone in ((1, []), (2, [1])):
        for version in (1, 2):
            summary = copied / f"evals/policy={version}/summary.json"
            edit_json(summary, sampled_accuracy=0.75 if version == better else 0.5)
        assert versions(copied, make_recipe(copied, LAST)) == gone


def test_the_command_says_first_then_removes_and_readers_are_told(
    copied: Path, task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    size = sum(
        (copied / "episode=0/policy" / name).stat().st_size
        for name in json.loads((copied / "episode=0/policy/_COMPLETE.json").read_text())["files"]
        if name not in ("config.json", "trainer/state.json", "trainer/steps.parquet")
    )
    said = run_command("gc", copied, LAST, NOT_BEST, "--dry-run").stdout
    assert f"would remove policy 1, {size:,} bytes, by learn.keep_policies" in said
    assert (copied / POLICY).exists()
    removed = json.loads(run_command("gc", copied, LAST, NOT_BEST, "--json").stdout)
    assert removed == {"files": [], "bytes": 0, "policies": [{"version": 1, "bytes": size}], "removed": True}
    assert not (copied / POLICY).exists()
    assert_verified(copied)
    assert "removed by the retention rule" in " ".join(run_command("status", copied, env=wide()).stdout.split())
    shown = run_command("inspect", copied, "--episode", "1", env=wide()).stdout
    assert "policy 1, removed by the retention rule" in " ".join(shown.split())
    recipe = make_recipe(copied)
    InlineStages(open_run(recipe)).eval(1)  # done before: nothing is read of the policy
    shutil.rmtree(copied / "evals/policy=1")
    with pytest.raises(MissingInputError, match="policy version 1 was removed by the retention rule"):
        InlineStages(open_run(recipe)).eval(1)
    refused = run_command("replay", copied, "--episodes", "1", "--into", tmp_path / "replay")
    assert (refused.returncode, "removed by the retention rule" in refused.stderr) == (2, True)
    assert not (tmp_path / "replay").exists()
    assert run_command("gc", copied, "learn.keep_last=3").returncode == 2


def wide() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "300"}


def test_what_a_removed_policy_leaves_is_still_checked(copied: Path, make_recipe: Callable[..., Recipe]) -> None:
    remove_policies(RunDir(copied), make_recipe(copied, LAST, NOT_BEST))
    for name in ("config.json", "_COMPLETE.json", "_REMOVED.json"):
        path = copied / "episode=0/policy" / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"0", b"1", 1))
        assert path.name in {found.file.name for found in verify_run(copied).findings}, name
        path.write_bytes(whole)
    assert_verified(copied)


@needs_strace
def test_killed_in_the_middle_the_same_command_finishes(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wanted = Path(shutil.copytree(finished_run.dir.path, tmp_path / "wanted"))
    remove_policies(RunDir(wanted), make_recipe(wanted, LAST, NOT_BEST))
    names = {path.relative_to(wanted) for path in wanted.rglob("*")}
    for kill in (1, 2, 4):
        copied = Path(shutil.copytree(finished_run.dir.path, tmp_path / str(kill)))
        command = opd_cache_command("gc", copied, LAST, NOT_BEST)
        inject = f"inject=?unlink,?unlinkat:signal=KILL:when={kill}"
        traced = ["strace", "-f", "-o", "/dev/null", "-e", "trace=?unlink,?unlinkat", "-e", inject, *command]
        assert subprocess.run(traced, capture_output=True).returncode == -9
        assert_verified(copied)
        assert (copied / "episode=0/policy/trainer").exists()
        finished = run_command("gc", copied, LAST, NOT_BEST)
        assert finished.returncode == 0, finished.stderr
        assert {path.relative_to(copied) for path in copied.rglob("*")} == names
