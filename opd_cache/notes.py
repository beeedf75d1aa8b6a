"""What pieces of work took, and why some failed: small JSON files beside the data, which no stage reads."""

import json
import logging
import os
import socket
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd_cache.errors import ConfigError, OpdCacheError, TryAgainError
from opd_cache.run_dir import FAILED_SHARD, RolloutSet, RunDir
from opd_cache.shortage import shortage
from opd_cache.store.publish import replace_file
from opd_cache.store.shards import ShardSet

log = logging.getLogger(__name__)
FAILURES_BEFORE_STOP = 3  # by then it is not the shards
REASON_CHARS = 500
# By what whoever looks for a process's output finds it.
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


class ShardsFailedError(OpdCacheError, RuntimeError):
    """Shards could not be made, for a reason that is no error of ours: a reward or a sampler raised it."""


def write_note(final: Path, note: dict[str, Any]) -> None:
    """Keep what a piece of work took, beside the data: seconds, host, engine. Later attempts replace it."""
    replace_file(final, json.dumps(note) + "\n")


def shard_note_name(shards: ShardSet, shard: int) -> str:
    """The name of a shard's note. Several teachers score the shards of one episode."""
    return f"{shards.folder.name}-shard-{shard:05d}"


class ShardAttempts:
    """Makes shards one by one and writes down those that fail for good, so that one does not hide the others."""

    def __init__(self, stage: str, run: RunDir, target: RolloutSet, shards: ShardSet, num_shards: int) -> None:
        self.stage, self.run, self.target, self.shards = stage, run, target, shards
        self.num_shards = num_shards  # to make, of all that the plan has
        self.failed: list[int] = []
        self.first: Exception | None = None

    def make(self, shard: int, make: Callable[[int], None]) -> None:
        """Call `make(shard)`. Raises at once what another shard would meet as well; the rest is raised by `check`, or here
        when too many have failed."""
        try:
            make(shard)
        except (ConfigError, TryAgainError, MemoryError):
            raise
        except Exception as error:
            if shortage(error) is not None:
                raise
            self._write_down(shard, error)
            if len(self.failed) == FAILURES_BEFORE_STOP < self.num_shards:
                self.check(", and no more were tried")
        else:
            self._failure_note(shard).unlink(missing_ok=True)

    def check(self, remark: str = "") -> None:
        """Raises one error for all shards that failed, of the first one's class where it is ours."""
        if self.first is None:
            return
        is_ours = isinstance(self.first, OpdCacheError)
        reason = _line(self.first) if is_ours else f"{type(self.first).__name__}: {_line(self.first)}"
        kind = type(self.first) if isinstance(self.first, OpdCacheError) else ShardsFailedError
        numbers = ", ".join(map(str, self.failed))
        raise kind(
            f"{len(self.failed)} of {self.num_shards} shards failed ({numbers}){remark}: {reason}"
        ) from self.first

    def _write_down(self, shard: int, error: Exception) -> None:
        self.failed.append(shard)
        self.first = self.first or error
        note = {
            "stage": self.stage,
            "shard": shard,
            "file": str(self.shards.path(shard).relative_to(self.run.path)),
            "error": type(error).__name__,
            "message": _line(error),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **{name.lower(): os.environ[name] for name in JOB_VARIABLES if name in os.environ},
            "traceback": "".join(traceback.format_exception(error)),
        }
        traceback.clear_frames(error.__traceback__)  # else they keep what the shard held in memory
        write_note(self._failure_note(shard), note)
        log.warning(
            "%-7s %s shard %d/%d failed | %s: %s",
            self.stage, self.target.label, shard + 1, self.shards.num_shards, note["error"], note["message"],
        )  # fmt: skip

    def _failure_note(self, shard: int) -> Path:
        name = f"{shard_note_name(self.shards, shard)}{FAILED_SHARD}"
        return self.run.log_folder(self.stage, self.target.log_name) / name


def _line(error: Exception) -> str:
    """What an error says, on one line; cut where it is not ours."""
    return str(error) if isinstance(error, OpdCacheError) else " ".join(str(error).split())[:REASON_CHARS]
