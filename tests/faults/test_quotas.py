"""A disk with too few bytes, or too few inodes, for what a stage writes."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_client import FaultServer
from fault_log import FaultLog, is_full
from oracle import assert_ends_as, assert_intact, assert_said, published, temporaries
from stages import STAGES, Stages
from trials import every_fault

PAGE = 4096
DISK = "size=8m,nr_inodes=400"
BALLAST = "ballast"


@pytest.fixture(scope="module")
def small(shim: Path, stages: Stages, warm_up: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Stages on a disk of which the tests can leave as little as they want."""
    folder = tmp_path_factory.mktemp("small_disk")
    prefix = ("unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o {DISK} none {folder} && exec "$@"', "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted in a user namespace here: {error}")
    server = FaultServer(shim, warm_up, prefix)
    # A path that leads to the disk from inside the server's namespace and from here.
    inside = Path(f"/proc/{server.process.pid}/root{folder}")
    while not inside.is_mount():
        time.sleep(0.01)
    yield Stages(server, stages.recipe, inside, like=stages)
    server.close()


def wait_for_deleted_files(folder: Path) -> None:
    """What was deleted takes room as long as somebody has it open, which may be a moment longer than its name is there."""
    deadline = time.monotonic() + 10
    while (disk := os.statvfs(folder)).f_files - disk.f_ffree > 1 + inodes_of(folder):
        assert time.monotonic() < deadline, "a deleted file is still open"
        time.sleep(0.01)


def leave_bytes(folder: Path, pages: int) -> None:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize // PAGE
    (folder / BALLAST).write_bytes(bytes(max(0, free - pages) * PAGE))


def leave_inodes(folder: Path, count: int) -> None:
    (folder / BALLAST).mkdir()
    for number in range(os.statvfs(folder).f_favail - count):
        (folder / BALLAST / str(number)).touch()


def remove_ballast(folder: Path) -> None:
    path = folder / BALLAST
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def pages_of(run: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in run.rglob("*") if path.is_file()) if run.exists() else 0


def inodes_of(run: Path) -> int:
    return len({path.stat().st_ino for path in run.rglob("*")}) if run.exists() else 0


@pytest.mark.parametrize(
    ("leave", "size_of"), [(leave_bytes, pages_of), (leave_inodes, inodes_of)], ids=["bytes", "inodes"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_with_too_little_room_is_named_and_the_stage_completes_once_there_is_more(
    small: Stages, faults: FaultLog, stage: str, leave: Callable[[Path, int], None], size_of: Callable[[Path], int]
) -> None:
    undisturbed = small.done(stage)[0]
    with small.fresh(stage) as run:
        need = size_of(undisturbed) - size_of(run)
    with every_fault(faults, f"a quota of {leave.__name__.removeprefix('leave_')}") as trial:
        for left in range(need) if is_full() else sorted({0, need // 3, need * 2 // 3}):
            with trial(f"{stage}, {left} of {need} left"), small.fresh(stage) as run:
                before = published(run)
                wait_for_deleted_files(small.folder)
                leave(small.folder, left)
                ended = small.again(stage, run)
                remove_ballast(small.folder)
                assert_said(ended, 75)
                assert "No space left on device" in ended.said
                assert_intact(run, before)
                assert temporaries(run) == []
                assert_ends_as(run, undisturbed, lambda run=run: small.again(stage, run))
