"""Killed anywhere, the same command goes on, and nothing tells the result from that of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import complete, differences, opd_cache_command

from opd_cache.config import Recipe
from opd_cache.run import Run


def count_entries(folder: Path) -> int:
    """Files and folders below `folder` while another process works there; unlike rglob, walk lets them vanish."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(
    finished_run: Run, task: Path, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "run"
    recipe = [str(task / "recipe.yaml"), "learn.checkpoint_every_steps=1"]
    script = str(Path(__file__).parent / "kill_chain.py")
    chain = subprocess.run(
        [sys.executable, script, str(seed), str(path), *recipe], capture_output=True, text=True, timeout=120
    )
    assert chain.returncode == 0, chain.stderr
    result = json.loads(chain.stdout)
    assert result["kills"] >= 5
    assert len({operation.split()[0] for operation in result["operations"]}) >= 2
    assert differences(path, finished_run.dir.path) == []


def test_killed_from_outside_at_random_moments_it_ends_with_the_same_bytes(
    finished_run: Run, task: Path, tmp_path: Path
) -> None:
    path, rng = tmp_path / "run", random.Random(0)
    command = opd_cache_command("run", str(task / "recipe.yaml"), f"run_dir={path}", "learn.checkpoint_every_steps=1")
    for _ in range(3):
        target = count_entries(path) + rng.randint(8, 40)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and count_entries(path) < target:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert differences(path, finished_run.dir.path) == []


def test_a_second_run_of_the_same_command_changes_nothing(finished_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(path.rglob("*")) if p.is_file()}
    finished_run.recipe.run_dir = str(path)
    try:
        complete(finished_run.recipe)
    finally:
        finished_run.recipe.run_dir = str(finished_run.dir.path)
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(path.rglob("*")) if p.is_file()}
    assert before == after


def test_learning_resumed_at_any_checkpoint_equals_learning_in_one_go(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Every checkpoint inside an episode is put back alone, and gone on from in a fresh engine."""
    from opd_cache.learn import stage
    from opd_cache.run import open_run

    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    for folder in ("policy", "learn"):
        shutil.rmtree(path / "episode=1" / folder)
    keeping = open_run(make_recipe(path, "learn.keep_every=1"))
    stage.learn_episode(keeping, 1, stage.new_engine(keeping))
    assert differences(path, finished_run.dir.path) == []
    kept = [
        Path(shutil.move(folder, tmp_path / folder.name))
        for folder in sorted((path / "episode=1/learn").glob("checkpoint-*"))
    ]
    run = open_run(make_recipe(path))
    assert [folder.name for folder in kept] == ["checkpoint-000001", "checkpoint-000002"]
    for folder in kept:
        shutil.rmtree(path / "episode=1" / "policy")
        (path / "episode=1" / "learn" / "steps.parquet").unlink()
        shutil.copytree(folder, path / "episode=1" / "learn" / folder.name)
        stage.learn_episode(run, 1, stage.new_engine(run))
        assert differences(path, finished_run.dir.path) == []
