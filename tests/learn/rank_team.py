"""Ranks that learn an episode together, forked from one process that has imported everything once.

usage: rank_team.py '{"world": 2, "recipe": ["recipe.yaml", "key=value"], "episode": 0, "kills": 3, "seed": 0}'

Runs the ranks to their end. With "kills", a drawn rank first SIGKILLs itself before or after a drawn step, again and
again, and new ranks go on, in the end "last_world" of them. Prints the exit statuses of each attempt's ranks, and the
rollouts of every step taken by each rank.
"""

import json
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

torch.set_num_threads(1)  # a forked child must find no thread pool that it cannot use

from opd_cache import cli  # noqa: E402
from opd_cache.learn import stage  # noqa: E402
from opd_cache.learn.engines import torch as _torch_engine  # noqa: E402, F401
from opd_cache.learn.step import Trainer  # noqa: E402

original_step = Trainer.step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WatchedTrainer(Trainer):
    """Notes the rollouts of each step, and dies where it is told to."""

    notes: Path
    death: tuple[int, bool] | None = None  # (step of this attempt, before it?)
    steps = 0

    def step(self, batch: Sequence[Any], step: int, *arguments: Any, **options: Any) -> dict[str, Any]:
        self._die_if(before=True)
        metrics = super().step(batch, step, *arguments, **options)
        with open(self.notes, "a") as file:
            file.write(json.dumps([step, [rollout.rollout_id for rollout, _ in batch]]) + "\n")
        self._die_if(before=False)
        WatchedTrainer.steps += 1
        return metrics

    def _die_if(self, before: bool) -> None:
        if self.death == (self.steps, before):
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(job: dict[str, Any], world: int, death: tuple[int, tuple[int, bool]] | None, notes: Path) -> list[int]:
    """Exit statuses of the ranks; negative for a signal."""
    port = str(free_port())
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            WatchedTrainer.notes = notes.with_suffix(f".{rank}")
            WatchedTrainer.death = death[1] if death and death[0] == rank else None
            stage.Trainer = WatchedTrainer
            sys.argv = ["opd-cache", "learn", *job["recipe"], "--episode", str(job["episode"])]
            try:
                cli.main()
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    job = json.loads(sys.argv[1])
    rng = random.Random(job.get("seed", 0))
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        for _ in range(job.get("kills", 0)):
            death = (rng.randrange(job["world"]), (rng.randrange(job["steps_a_life"]), rng.random() < 0.5))
            statuses.append(attempt(job, job["world"], death, notes))
        statuses.append(attempt(job, job.get("last_world", job["world"]), None, notes))
        steps = [
            [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(Path(folder).iterdir())
        ]
    print(json.dumps({"statuses": statuses, "steps": steps}))


main()
