"""The quickstart, killed again and again until it is through. Minutes: only where every fault is wanted."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_log import FaultLog, is_full
from helpers import data_files, opd_cache_command
from killing import after, run_until
from oracle import assert_complete, assert_intact, published
from trials import every_fault

from opd_cache.store.publish import TEMPORARY_SUFFIX

INTERVAL_S = (2.0, 6.0)  # between two kills, doubled for as long as nothing gets further
MOST_KILLS = 500


def progress(*folders: Path) -> int:
    """Files and folders under their final names, checkpoints included."""
    names = (path for folder in folders for path in folder.rglob("*"))
    return sum(not any(part.endswith(TEMPORARY_SUFFIX) for part in path.parts) for path in names)


@pytest.mark.skipif(not is_full(), reason="minutes; FAULTS=full runs it")
def test_the_quickstart_killed_every_few_seconds_ends_with_the_bytes_of_an_undisturbed_one(
    faults: FaultLog, tmp_path: Path
) -> None:
    undisturbed, killed, task = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "task"
    commands = {
        run: opd_cache_command("run", "quickstart", f"run_dir={run}", f"task.dir={task}")
        for run in (undisturbed, killed)
    }
    start = time.monotonic()
    subprocess.run(commands[undisturbed], check=True, capture_output=True)
    print(f"undisturbed: {time.monotonic() - start:.0f} s")
    task.rename(tmp_path / "first_task")  # the killed one makes its own, under the name that its run records
    rng, start, kills, stuck, status = random.Random(5), time.monotonic(), 0, 0, -signal.SIGKILL
    with every_fault(faults, "kills of the quickstart's process group every few seconds") as trial:
        while status != 0:
            before, had = published(killed), progress(killed, task)
            with trial(f"kill {kills}"):
                status = run_until(commands[killed], after(rng.uniform(*INTERVAL_S) * 2**stuck))
                assert status in (0, -signal.SIGKILL)
                assert_intact(killed, before)
            stuck = 0 if progress(killed, task) > had else stuck + 1
            kills += status != 0
            assert kills < MOST_KILLS
    assert_complete(killed, undisturbed)
    count = len(data_files(killed))
    print(f"killed {kills} times: {time.monotonic() - start:.0f} s, {count} files compared")
