"""The life of a shard, the same for every stage: take one's share of the missing, make, publish, note, seal."""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from opd_cache.errors import ConfigError
from opd_cache.logs import StageProgress, short
from opd_cache.notes import ShardAttempts, shard_note_name, write_note
from opd_cache.run_dir import RolloutSet, RunDir
from opd_cache.stall import phase
from opd_cache.store.plans import RolloutPlan
from opd_cache.store.shards import ShardSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which missing shards this process makes: those with index % num_tasks == task, or one by number."""

    task: int = 0
    num_tasks: int = 1
    shard: int | None = None

    def of(self, missing: list[int]) -> list[int]:
        if self.shard is not None:
            return [shard for shard in missing if shard == self.shard]
        return [shard for shard in missing if shard % self.num_tasks == self.task]

    def check(self, shards: ShardSet) -> None:
        """Raises ConfigError when the one shard asked for is none of the plan's."""
        if self.shard is not None and self.shard >= shards.num_shards:
            raise ConfigError(
                f"--shard {self.shard}: {shards.folder} has {shards.num_shards} shards, numbered from 0. Run: {shards.remedy} --shard {shards.num_shards - 1}"
            )


EVERYTHING = Share()
Figures = Counter[str]  # sums over the rows of a shard, from health/figures.py
MakeBatches = Callable[[int, StageProgress, Figures], Iterable[pa.RecordBatch]]


def make_shards(
    stage: str,
    run: RunDir,
    target: RolloutSet,
    plan: RolloutPlan,
    shards: ShardSet,
    share: Share,
    make: MakeBatches,
    facts: dict[str, Any],
) -> bool:
    """Make this process's share of the missing shards and seal the stage when all are there; True when sealed.

    `make(shard, progress, figures)` yields a shard's record batches and adds up its figures. `facts` (engine, dtype,
    ...) go into the shard's log.
    A shard that fails for good does not keep the others from being made; then one error is raised for all of them.
    Raises ConfigError when the share is a shard that the plan does not have.
    """
    share.check(shards)
    todo = share.of(shards.missing())
    log_folder = run.log_folder(stage, target.log_name)
    attempts = ShardAttempts(stage, run, target, shards, len(todo))
    with StageProgress(stage, target.label, sum(plan.shard_rollouts(shard) for shard in todo)) as progress:

        def make_one(shard: int) -> None:
            start, tokens_before = time.monotonic(), progress.tokens
            figures: Figures = Counter()
            won = shards.publish(shard, lambda: make(shard, progress, figures), figures)
            pa.default_memory_pool().release_unused()  # else Arrow's heap grows from shard to shard for a while
            seconds, tokens = time.monotonic() - start, progress.tokens - tokens_before
            note = {
                "stage": stage,
                "shard": shard,
                "rows": plan.shard_rollouts(shard),
                "tokens": tokens,
                "seconds": round(seconds, 4),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "published": won,
                **facts,
            }
            write_note(log_folder / f"{shard_note_name(shards, shard)}.json", note)
            _log_shard(target, shards, note)

        for shard in todo:
            if shards.path(shard).exists():
                progress.advance(plan.shard_rollouts(shard), 0)
                log.info(
                    "%-7s %s shard %d/%d | made by another process", stage, target.label, shard + 1, shards.num_shards
                )
            else:
                attempts.make(shard, make_one)
    attempts.check()
    with phase(f"sealing {shards.folder.name}"):
        return shards.seal()


def _log_shard(target: RolloutSet, shards: ShardSet, note: dict[str, Any]) -> None:
    log.info(
        "%-7s %s shard %d/%d | %d rollouts | %s tokens | %s tok/s | %.1f s%s",
        note["stage"],
        target.label,
        note["shard"] + 1,
        shards.num_shards,
        note["rows"],
        short(note["tokens"]),
        short(note["tokens"] / max(note["seconds"], 1e-9)),
        note["seconds"],
        "" if note["published"] else " | another process was first",
    )
