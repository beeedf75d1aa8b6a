"""A file-size limit: nothing short is published, and the same work again completes it. More faults: tests/faults."""

from pathlib import Path

import pytest
from store_helpers import rollout_set
from worker_client import Ended, Worker

from opd_cache.store.join import read_rollouts

WORKS = ("publish_shard", "publish_two_files", "seal_two_shards")


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
    for work in WORKS:
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


def assert_try_again(ended: Ended, folder: Path, reason: str) -> None:
    assert ended.status == 75, ended
    assert ended.said.startswith(str(folder))
    assert f": {reason}. Nothing unfinished was published; make room and run the same command again." in ended.said
    assert "\n" not in ended.said


@pytest.mark.parametrize("work", WORKS)
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
