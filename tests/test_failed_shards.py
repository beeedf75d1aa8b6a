"""Shards that fail for good: the others are made, and what failed is written down, raised and shown."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import data_files, run_command

from opd_cache.config import Recipe
from opd_cache.errors import StoreError, TryAgainError
from opd_cache.notes import ShardsFailedError
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.status import run_status
from opd_cache.store.plans import load_rollout_plan

OPTIONS = ("rollout.reward=own_rewards:told_to_fail", "rollout.sampler=random_sampler:RandomSampler")
Open = Callable[..., Run]


@pytest.fixture
def open_rewarded(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Open:
    """The run of tmp_path/run with a reward that fails where the environment says."""
    return lambda *settings: open_run(make_recipe(tmp_path / "run", *OPTIONS, *settings))


@pytest.fixture(scope="module")
def unfailing(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same without a failure. Its plan says which prompts are in which shard."""
    run = open_run(make_recipe(tmp_path_factory.mktemp("unfailing") / "run", *OPTIONS))
    assert InlineStages(run).rollout(0)
    return run


def prompt_in(run: Run, shard: int) -> str:
    return f"p{load_rollout_plan(run.dir.episode(0)).shard_prompts(shard)[1]}"


def published(run: Run) -> list[str]:
    return sorted(path.name for path in run.dir.episode(0).rollouts.glob("*"))


def notes_of(run: Run) -> list[str]:
    return sorted(path.name for path in run.dir.logs.rglob("*.failed.json"))


def test_a_failed_shard_does_not_hide_the_others_and_is_made_later(
    unfailing: Run, open_rewarded: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompt = open_rewarded(), prompt_in(unfailing, 0)
    monkeypatch.setenv("RAISES", prompt)
    with pytest.raises(ShardsFailedError) as caught:
        InlineStages(run).rollout(0)
    assert str(caught.value) == f"1 of 3 shards failed (0): ValueError: boom at {prompt}"
    assert caught.value.exit_status == 2
    assert published(run) == ["shard-00001-of-00003.parquet", "shard-00002-of-00003.parquet"]
    assert notes_of(run) == ["rollouts-shard-00000.failed.json"]
    (failed,) = run_status(run.dir.path)["failed_shards"]
    assert (failed["stage"], failed["shard"], failed["error"]) == ("rollout", 0, "ValueError")
    assert failed["message"] == f"boom at {prompt}"
    assert failed["file"] == "episode=0/rollouts/shard-00000-of-00003.parquet"
    assert failed["pid"] == os.getpid()
    assert "in told_to_fail" in failed["traceback"]
    assert "slurm_job_id" not in failed
    monkeypatch.delenv("RAISES")
    assert InlineStages(run).rollout(0)
    assert notes_of(run) == []
    assert run_status(run.dir.path)["failed_shards"] == []
    assert data_files(run.dir.path) == data_files(unfailing.dir.path)


def test_of_several_failures_the_first_is_raised_in_its_own_class(
    unfailing: Run, open_rewarded: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_rewarded()
    monkeypatch.setenv("SAYS_MUCH", prompt_in(unfailing, 0))
    monkeypatch.setenv("RAISES", prompt_in(unfailing, 2))
    with pytest.raises(StoreError, match=r"^2 of 3 shards failed \(0, 2\): rollout.reward = .* gave 'much' for 0/"):
        InlineStages(run).rollout(0)
    assert published(run) == ["shard-00001-of-00003.parquet"]
    assert [note["error"] for note in run_status(run.dir.path)["failed_shards"]] == ["StoreError", "ValueError"]


def test_after_three_failures_no_more_are_tried(
    unfailing: Run, open_rewarded: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_rewarded("rollout.prompts_per_shard=2")
    monkeypatch.setenv("RAISES", ",".join(f"p{index}" for index in range(24)))
    with pytest.raises(
        ShardsFailedError, match=r"^3 of 6 shards failed \(0, 1, 2\), and no more were tried: ValueError"
    ):
        InlineStages(run).rollout(0)
    assert len(notes_of(run)) == 3


def test_what_may_get_better_by_itself_stops_at_once_and_is_no_failure(
    unfailing: Run, open_rewarded: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompt = open_rewarded(), prompt_in(unfailing, 1)
    monkeypatch.setenv("TRIES_AGAIN", prompt)
    with pytest.raises(TryAgainError, match=f"^no answer for {prompt}$"):
        InlineStages(run).rollout(0)
    assert published(run) == ["shard-00000-of-00003.parquet"]
    assert notes_of(run) == []


def test_the_commands_say_which_shards_failed_and_in_which_job(unfailing: Run, task: Path, tmp_path: Path) -> None:
    prompt = prompt_in(unfailing, 1)
    slurm = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    slurm |= {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **slurm, "RAISES": prompt, "PYTHONPATH": places}
    recipe = [str(task / "recipe.yaml"), f"run_dir={tmp_path}/run", *OPTIONS]
    done = run_command("rollout", *recipe, "--episode", "0", env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"ShardsFailedError: 1 of 3 shards failed (1): ValueError: boom at {prompt}"
    assert f"rollout episode 0 shard 2/3 failed | ValueError: boom at {prompt}" in done.stderr
    assert "Traceback" not in done.stderr
    (failed,) = json.loads(run_command("status", f"{tmp_path}/run", "--json").stdout)["failed_shards"]
    assert failed["slurm_array_job_id"] == "70"
    shown = run_command("status", f"{tmp_path}/run", env={**os.environ, "COLUMNS": "200"}).stdout
    assert "failed shards" in shown
    assert f"ValueError: boom at {prompt}" in shown
    assert "job 70_3" in shown
