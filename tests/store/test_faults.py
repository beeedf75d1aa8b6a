"""Killed, out of disk space, or both: what has its final name is whole, and the same work again completes it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from store_helpers import rollout_set
from worker_client import Ended, Worker

from opd_cache.store.join import read_rollouts

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

CALLS = {
    "openat": "openat",
    "write": "write",
    "fsync": "fsync",
    "link": "?link,?linkat",
    "unlink": "?unlink,?unlinkat",
    "mkdir": "?mkdir,?mkdirat",
    "rename": "?rename,?renameat,?renameat2",
}
# How often each work makes a call, at least; kills before every one of them, and the last run is left alone.
LEAST_CALLS = {
    "publish_shard": {"openat": 4, "write": 1, "fsync": 2, "link": 1, "unlink": 1, "mkdir": 2},
    "publish_two_files": {"openat": 6, "write": 2, "fsync": 5, "mkdir": 2, "rename": 1},
    "seal_two_shards": {"openat": 10, "write": 3, "fsync": 6, "link": 3, "unlink": 3, "mkdir": 2},
}
WORK_AND_CALL = [(work, call) for work, calls in LEAST_CALLS.items() for call in calls]


def published(folder: Path) -> dict[str, bytes]:
    """Everything under a final name."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in files if not is_temporary(path)}


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if is_temporary(path)]


def is_temporary(path: Path) -> bool:
    return any(part.startswith(".") and part.endswith(".tmp") for part in path.parts)


@pytest.fixture(scope="module")
def undisturbed(worker: Worker, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each work publishes when nothing happens to it."""
    results = {}
    for work in LEAST_CALLS:
        folder = tmp_path_factory.mktemp(work)
        assert worker.run(work, folder) == (0, "true")
        assert temporaries(folder) == []
        results[work] = published(folder)
    return results


def assert_whole_or_absent(work: str, folder: Path, expected: dict[str, bytes]) -> None:
    found = published(folder)
    assert {name: expected.get(name) for name in found} == found
    if work == "publish_two_files":
        assert len(found) in (0, len(expected))
    else:
        shards = rollout_set(folder, 2 if work == "seal_two_shards" else 1)
        for shard in set(range(shards.num_shards)) - set(shards.missing()):
            assert len(list(read_rollouts(shards, shard))) > 0


@needs_strace
@pytest.mark.parametrize(("work", "call"), WORK_AND_CALL)
def test_killed_before_any_durable_step_leaves_whole_files_and_can_go_on(
    worker: Worker, undisturbed, tmp_path, work, call
):
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        folder.mkdir()
        ended = worker.traced(work, folder, f"{CALLS[call]}:signal=KILL:when={kills + 1}")
        assert_whole_or_absent(work, folder, undisturbed[work])
        if ended.status == 0:
            break
        assert ended.status == -9, ended
        kills += 1
        again = worker.run(work, folder)
        assert again.status == 0, again
        assert published(folder) == undisturbed[work]
    assert kills >= LEAST_CALLS[work][call]


@needs_strace
@pytest.mark.parametrize(
    ("work", "call"), [pair for pair in WORK_AND_CALL if pair[1] in ("write", "fsync", "link", "mkdir", "rename")]
)
def test_disk_full_at_any_step_says_try_again_and_leaves_nothing_unfinished(
    worker: Worker, undisturbed, tmp_path, work, call
):
    failures = 0
    while True:
        folder = tmp_path / str(failures)
        folder.mkdir()
        ended = worker.traced(work, folder, f"{CALLS[call]}:error=ENOSPC:when={failures + 1}")
        assert_whole_or_absent(work, folder, undisturbed[work])
        assert temporaries(folder) == []
        if ended.status == 0:
            break
        assert_try_again(ended, folder, "No space left on device")
        failures += 1
        assert worker.run(work, folder).status == 0
        assert published(folder) == undisturbed[work]
    assert failures >= LEAST_CALLS[work][call]


def assert_try_again(ended: Ended, folder: Path, reason: str) -> None:
    assert ended.status == 75, ended
    assert ended.said.startswith(str(folder))
    assert f": {reason}. Nothing unfinished was published; make room and run the same command again." in ended.said
    assert "\n" not in ended.said


@pytest.mark.parametrize("work", LEAST_CALLS)
def test_file_size_limit_says_try_again_and_publishes_nothing_short(worker: Worker, undisturbed, tmp_path, work):
    largest = max(map(len, undisturbed[work].values()))
    for limit in (0, 1, 100, largest // 2, largest - 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        assert_try_again(worker.run(work, folder, max_file_bytes=limit), folder, "File too large")
        assert_whole_or_absent(work, folder, undisturbed[work])
        assert len(published(folder)) < len(undisturbed[work])
        assert temporaries(folder) == []
        assert worker.run(work, folder, max_file_bytes=largest) == (0, "true")
        assert published(folder) == undisturbed[work]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """(worker, folder): a worker that sees a disk of 256 KiB at the folder."""
    folder, warm = tmp_path_factory.mktemp("small_disk"), tmp_path_factory.mktemp("warm_beside_small_disk")
    prefix = ("unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size=256k none {folder} && exec "$@"', "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted in a user namespace here: {error}")
    worker = Worker(warm, prefix)
    yield worker, folder
    worker.close()


@pytest.mark.parametrize("work", ["publish_shard", "publish_two_files", "publish_weights"])
def test_full_disk_says_try_again_and_completes_once_there_is_room(small_disk, work):
    worker, folder = small_disk
    assert worker.run("fill_disk", folder).status == 0
    assert_try_again(worker.run(work, folder), folder, "No space left on device")
    assert worker.run("list_files", folder).said == '["ballast"]'
    assert worker.run("free_disk", folder).status == 0
    assert worker.run(work, folder) == (0, "true")
    assert worker.run("remove_all", folder).status == 0
