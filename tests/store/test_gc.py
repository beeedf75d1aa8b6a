"""What dead processes left is removed; what living ones write, and what is published, is not."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import run_command

from opd_cache.run import Run
from opd_cache.store.gc import dead_temporaries, remove_temporary


def temporary(folder: Path, host: str, pid: int, is_folder: bool = False) -> Path:
    path = folder / f".shard-00000-of-00002.parquet.{host}.{pid}.0123abcd.tmp"
    if is_folder:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"x" * 10)
    else:
        path.write_bytes(b"x" * 10)
    return path


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_dead_process_of_this_machine_left_is_found_at_once(
    tmp_path: Path, dead_pid: int, is_folder: bool
) -> None:
    dead = temporary(tmp_path, socket.gethostname(), dead_pid, is_folder)
    temporary(tmp_path, socket.gethostname(), os.getpid())
    found = [path for path, _ in dead_temporaries(tmp_path, 3600)]
    assert found == [dead]
    remove_temporary(dead)
    assert not dead.exists()


def test_another_machines_file_is_left_until_it_is_old(tmp_path: Path, dead_pid: int) -> None:
    path = temporary(tmp_path, "node7.cluster", os.getpid())
    assert list(dead_temporaries(tmp_path, 3600)) == []
    old = time.time() - 4000
    os.utime(path, (old, old))
    assert list(dead_temporaries(tmp_path, 3600)) == [(path, 10)]


def test_files_of_other_names_are_never_found(tmp_path: Path) -> None:
    for name in ("shard-00000-of-00002.parquet", "room.tmp", ".hidden.tmp", "notes.host.1.0123abcd.tmp"):
        (tmp_path / name).write_text("kept")
    assert list(dead_temporaries(tmp_path, 0)) == []


def test_the_command_removes_only_temporaries(finished_run: Run, tmp_path: Path, dead_pid: int) -> None:
    folder = finished_run.dir.path
    before = sorted(path for path in folder.rglob("*"))
    dead = temporary(finished_run.dir.episode(0).rollouts, socket.gethostname(), dead_pid)
    shown = json.loads(run_command("gc", str(folder), "--dry-run", "--json").stdout)
    assert shown == {"files": [str(dead)], "bytes": 10, "policies": [], "removed": False}
    assert "removed 1 temporary files, 10 bytes" in run_command("gc", str(folder)).stdout
    assert sorted(path for path in folder.rglob("*")) == before
    assert run_command("gc", str(tmp_path)).returncode == 2
