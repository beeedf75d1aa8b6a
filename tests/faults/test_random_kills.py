"""Whole process groups killed from outside, at moments drawn at random."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_log import FaultLog, is_full
from helpers import opd_cache_command
from killing import run_until
from oracle import assert_complete, assert_intact, published
from stages import TINY, Stages
from trials import Trial, every_fault

ROW = "kills of the process group at random moments of a run"
KILLS = 200 if is_full() else 8
COMMAND_KILLS = 8 if is_full() else 1


@pytest.fixture(scope="module")
def whole_run(stages: Stages) -> tuple[Path, float]:
    """An undisturbed run of all stages and episodes, and its seconds."""
    run, start = stages.folder / "whole", time.monotonic()
    ended, _, _ = stages.server.run(run_command(stages, run), run)
    assert ended.status == 0, ended
    return run, time.monotonic() - start


def run_command(stages: Stages, run: Path) -> list[str]:
    return ["run", str(stages.recipe), *TINY, f"run_dir={run}"]


def kill_runs(
    trial: Trial, kills: int, folder: Path, undisturbed: Path, run_for_a_while: Callable[[Path, bool], int]
) -> None:
    """Kill a run again and again until it is through between two kills, then the next one; so many kills in all, and then
    none. run_for_a_while: of a run, and whether it is to be killed."""
    number, run = 0, folder / "run-0"
    for kill in range(kills):
        with trial(f"{folder.name} {run.name}, kill {kill}"):
            before = published(run)
            status = run_for_a_while(run, True)
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                assert_complete(run, undisturbed)
                number, run = number + 1, folder / f"run-{number + 1}"
            else:
                assert_intact(run, before)
    assert run_for_a_while(run, False) == 0
    assert_complete(run, undisturbed)


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    stages: Stages, faults: FaultLog, whole_run: tuple[Path, float]
) -> None:
    undisturbed, seconds = whole_run
    rng = random.Random(1)

    def run_for_a_while(run: Path, is_killed: bool) -> int:
        after_s = rng.uniform(0.05, seconds) if is_killed else None
        return stages.server.run(run_command(stages, run), run, kill_after_s=after_s).ended.status

    with every_fault(faults, ROW) as trial:
        kill_runs(trial, KILLS, stages.folder / "killed", undisturbed, run_for_a_while)


def test_a_command_killed_with_the_processes_of_its_stages_ends_with_the_same_bytes(
    stages: Stages, faults: FaultLog, whole_run: tuple[Path, float]
) -> None:
    rng = random.Random(2)

    def run_for_a_while(run: Path, is_killed: bool) -> int:
        most = count_entries(run) + rng.randint(4, 40)
        command = opd_cache_command(*run_command(stages, run), "launcher=subprocess")
        return run_until(command, lambda: is_killed and count_entries(run) >= most)

    with every_fault(faults, ROW) as trial:
        kill_runs(trial, COMMAND_KILLS, stages.folder / "killed-commands", whole_run[0], run_for_a_while)


def count_entries(folder: Path) -> int:
    """Files and folders below `folder` while another process works there; unlike rglob, walk lets them vanish."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))
