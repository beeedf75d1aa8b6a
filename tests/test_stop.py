"""Stages that are asked to stop, or that hang: they end soon, with status 75 and one line, and leave what is published."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SOON_S, Command

from opd_cache.config import Recipe
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run

# Enough that a shard takes seconds, and a signal comes in its middle.
MANY = ("rollout.n_samples_per_prompt=150", "eval.n_samples_per_prompt=400", "eval.teacher=false")


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.parquet"))


@pytest.fixture(scope="module")
def many_sampled(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampled") / "run"
    InlineStages(open_run(make_recipe(path, *MANY, "rollout.sampler=random_sampler:RandomSampler"))).rollout(0)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_sampling_in_the_middle_of_a_shard(
    start: Callable[..., Command], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run/episode=0/rollouts"
    command = start("rollout", *MANY, "--episode", "0")
    command.wait_for(lambda: published(folder) != [])
    before = (folder / "shard-00000-of-00003.parquet").read_bytes()
    time.sleep(0.5)
    command.stops(number)
    assert [path.name for path in folder.iterdir()] == ["shard-00000-of-00003.parquet"]
    assert (folder / "shard-00000-of-00003.parquet").read_bytes() == before


def test_a_signal_ends_the_loading_of_a_model(start: Callable[..., Command]) -> None:
    command = start("rollout", "rollout.sampler=stuck:LoadsForever", "--episode", "0")
    command.wait_for(command.begun.exists)
    time.sleep(0.3)
    command.stops(signal.SIGUSR1)


@pytest.mark.parametrize("sampler", ["Swallowing", "InADestructor"])
def test_a_signal_that_is_swallowed_ends_the_process_all_the_same(
    start: Callable[..., Command], tmp_path: Path, sampler: str
) -> None:
    command = start("rollout", f"rollout.sampler=stuck:{sampler}", "--episode", "0")
    command.wait_for(command.begun.exists)
    command.stops(signal.SIGTERM)
    assert len(list(tmp_path.glob("run/episode=0/rollouts/*"))) == 1
    assert not list(tmp_path.glob("run/episode=0/rollouts/.*"))


def test_a_signal_ends_scoring_in_the_middle_of_a_shard(
    start: Callable[..., Command], many_sampled: Path, tmp_path: Path
) -> None:
    shutil.copytree(many_sampled, tmp_path / "run")
    folder = tmp_path / "run/episode=0/scores/teacher=main"
    command = start("score", *MANY, "--episode", "0")
    command.wait_for(lambda: published(folder) != [])
    command.stops(signal.SIGUSR1)
    # How many shards a quick machine has finished by then is its own affair.
    assert 1 <= len(published(folder)) < 3
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", *published(folder)]


def test_a_signal_ends_an_evaluation(start: Callable[..., Command], tmp_path: Path) -> None:
    command = start("eval", *MANY, "--policy-version", "0")
    folder = tmp_path / "run/evals/policy=0"
    command.wait_for((folder / "mode=sampled/plan.json").exists)
    time.sleep(0.3)
    command.stops(signal.SIGTERM)
    assert (folder / "mode=greedy/rollouts/_SEALED.json").exists()
    assert not list((folder / "mode=sampled").rglob("*.tmp"))
    assert not (folder / "results.parquet").exists()


@pytest.mark.parametrize("launcher", ["inline", "subprocess"])
def test_a_signal_ends_a_whole_run_and_its_workers(
    start: Callable[..., Command], tmp_path: Path, launcher: str
) -> None:
    command = start("run", *MANY, "eval.path=null", f"launcher={launcher}", "num_workers=2")
    command.wait_for(lambda: published(tmp_path / "run/episode=0/rollouts") != [])
    command.process.send_signal(signal.SIGUSR1)
    line = command.ends(2 * SOON_S) if launcher == "inline" else command.process.communicate(timeout=2 * SOON_S)[1]
    assert command.process.returncode == 75
    assert line.count("stopped by SIGUSR1") == 1 if launcher == "inline" else 2
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run/episode=0/rollouts/_SEALED.json").exists()


STALL = "stall_timeout_s=10"  # above the time that imports take here


def test_what_is_stuck_in_c_code_ends_itself_and_leaves_what_is_published(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    command = start("rollout", "rollout.sampler=stuck:InC", STALL, "--episode", "0")
    command.wait_for(command.begun.exists)
    assert re.fullmatch(
        r"TryAgainError: no progress for 10 s \(stall_timeout_s\) since rollout episode 0, 8/24 rollouts; the process was in stuck.py:\d+. The same command goes on from what is published.",
        command.ends(10 + SOON_S),
    )
    assert os.listdir(tmp_path / "run/episode=0/rollouts") == ["shard-00000-of-00003.parquet"]


def test_a_blocked_read_ends_itself(start: Callable[..., Command]) -> None:
    command = start("rollout", "rollout.sampler=stuck:InARead", STALL, "--episode", "0")
    command.wait_for(command.begun.exists)
    assert "no progress for 10 s" in command.ends(10 + SOON_S)


def test_a_learner_that_stalls_ends_itself(start: Callable[..., Command], finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.dir.path, tmp_path / "run")
    for name in ("policy", "learn"):
        shutil.rmtree(tmp_path / "run/episode=1" / name)
    command = start("learn", "learn.loss.name=stuck:LOSS", STALL, "--episode", "1")
    command.wait_for(command.begun.exists)
    assert "since the beginning of learn episode 1; the process was in stuck.py:" in command.ends(10 + SOON_S)
    assert not (tmp_path / "run/episode=1/policy").exists()
