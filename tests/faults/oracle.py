"""What must hold after any fault, whatever it was: nothing published has changed, nobody was told a lie, and the same
command ends with the data of an undisturbed run.

    before = published(path)
    ended = ...                                  the command, with the fault
    assert_said(ended, -9)                       or 75, 2: as documented
    assert_intact(path, before)
    assert_ends_as(path, undisturbed, again)     again() gives the same command, undisturbed
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from commands import LOG_LINE
from fault_log import DataLostError, SilentError
from helpers import differences

from opd_cache.errors import MissingInputError, OpdCacheError
from opd_cache.run_dir import SEAL
from opd_cache.status import run_status
from opd_cache.store.gc import dead_temporaries, remove_temporary
from opd_cache.store.publish import TEMPORARY_SUFFIX
from opd_cache.verify.run import verify_run

# Notes, which later attempts replace, and checkpoints inside an episode, which its later ones and its policy make useless.
CHANGING = ("logs", "quarantine", "slurm")
CHECKPOINT = "checkpoint-"


class Ended(NamedTuple):
    """How a command ended: exit status (negative: the signal that killed it) and what it said on stderr."""

    status: int
    said: str


def published(run: Path) -> dict[str, bytes]:
    """Everything in a run that must never change: by its path in the run."""
    files = (path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file())
    return {str(path): (run / path).read_bytes() for path in files if not _may_change(path)}


def _may_change(path: Path) -> bool:
    return path.parts[0] in CHANGING or any(
        part.endswith(TEMPORARY_SUFFIX) or part.startswith(CHECKPOINT) for part in path.parts
    )


def temporaries(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob(f"*{TEMPORARY_SUFFIX}"))


def assert_said(ended: Ended, *statuses: int) -> None:
    """The command ended with one of these statuses and, unless killed or done, with one line beside its log."""
    if ended.status == 0 and 0 not in statuses:
        raise SilentError(f"status 0, expected one of {statuses}: {ended.said}")
    assert ended.status in statuses, ended
    if ended.status > 0:
        lines = [line for line in ended.said.splitlines() if not LOG_LINE.match(line)]
        assert len(lines) == 1, ended.said
        kind, _, message = lines[0].partition(": ")
        assert kind.isidentifier(), ended.said
        assert message, ended.said


def assert_intact(run: Path, before: dict[str, bytes], damaged: Collection[str] = ()) -> None:
    """All that was published is there unchanged, but for the `damaged` files; verify names exactly those; readers of the
    run's state answer or refuse in words."""
    now = published(run)
    if lost := sorted(name for name in before if name not in damaged and now.get(name) != before[name]):
        raise DataLostError(f"changed or gone: {lost}")
    named = findings(run)
    if named is None:
        assert "run.json" not in before, "verify finds no run any more"
        return
    if unnoticed := sorted(name for name in damaged if not any(name in text for text in named)):
        raise SilentError(f"verify does not find {unnoticed}: {named}")
    assert [text for text in named if not any(name in text for name in damaged)] == []
    try:
        run_status(run)
    except OpdCacheError:
        assert damaged, "status refuses a run that verify finds clean"


def findings(run: Path) -> list[str] | None:
    """What verify names, by `file: problem`; None where there is no run yet."""
    try:
        verdict = verify_run(run)
    except MissingInputError:
        return None
    return [f"{verdict.name(found.file)}: {found.problem}" for found in verdict.findings]


def assert_ends_as(run: Path, undisturbed: Path, again: Callable[[], Ended]) -> None:
    """The same command completes the run: the data of the undisturbed one, every row once, no temporary left by gc."""
    ended = again()
    if ended.status != 0:
        raise DataLostError(f"the same command again does not complete: {ended}")
    assert_complete(run, undisturbed)


def assert_complete(run: Path, undisturbed: Path) -> None:
    """The run is what the undisturbed one is."""
    if differing := differences(run, undisturbed):
        raise SilentError(f"completed with other data than the undisturbed run: {differing}")
    if findings(run) != []:
        raise SilentError(f"completed, and verify is not clean: {findings(run)}")
    assert_rows_once(run)
    collect_garbage(run)
    assert temporaries(run) == []


def collect_garbage(run: Path) -> None:
    """What `opd-cache gc` does."""
    for path, _ in list(dead_temporaries(run, min_age_s=3600)):
        remove_temporary(path)


def assert_rows_once(run: Path) -> None:
    """Every sealed folder holds as many rows as its seal says, and no row twice."""
    for seal in run.rglob(SEAL):
        if _may_change(seal.relative_to(run)):
            continue
        files = sorted(seal.parent.glob("shard-*.parquet"))
        ids = [row for file in files for row in pq.read_table(file, columns=["rollout_id"])["rollout_id"].to_pylist()]
        if len(ids) != len(set(ids)) or len(ids) != json.loads(seal.read_text())["rows"]:
            raise SilentError(f"{seal.parent}: {len(ids)} rows, {len(set(ids))} of them different")
