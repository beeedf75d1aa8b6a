"""The stages of a tiny run, each from what the ones before it have left, in children of a fault server."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

from fault import Fault
from fault_client import Counted, FaultServer
from fault_log import is_full
from oracle import Ended

# One of each thing that a run has, two of what it has several of: shards, steps, checkpoints, held-out prompts.
TINY = (
    "rollout.prompts_per_episode=4", "rollout.prompts_per_shard=2", "rollout.max_new_tokens=6",
    "learn.train_batch_size=4", "learn.checkpoint_every_steps=1", "eval.limit=2",
)  # fmt: skip
# In the order of a run; each begins where the one before it ended. A replay has a directory of its own.
COMMANDS = {
    "open": ("open",),
    "rollout": ("rollout", "--episode", "0"),
    "score": ("score", "--episode", "0"),
    "learn": ("learn", "--episode", "0"),
    "eval": ("eval", "--policy-version", "1"),
    "replay": ("replay",),
}
STAGES = tuple(COMMANDS)


class Stages:
    """Each stage: its command, its directory before and after, and a copy of the former to spoil."""

    def __init__(self, server: FaultServer, recipe: Path, folder: Path, like: "Stages | None" = None) -> None:
        """like: others, whose undisturbed runs are taken and need not lie in this folder too."""
        self.server, self.recipe, self.folder = server, recipe, folder
        self.done = like.done if like else cache(self._done)

    def command(self, stage: str, run: Path) -> list[str]:
        verb, *options = COMMANDS[stage]
        if verb == "replay":
            return [verb, str(self.done("learn")[0]), "--into", str(run)]
        return [verb, str(self.recipe), *TINY, f"run_dir={run}", *options]

    def _done(self, stage: str) -> tuple[Path, Mapping[str, int]]:
        """The undisturbed run after a stage, and how often the stage made each system call on it."""
        run = self.folder / "done" / stage
        self._copy_before(stage, run)
        ended, counts, _ = self.server.run(self.command(stage, run), run)
        assert ended.status == 0, ended
        return run, counts

    def _copy_before(self, stage: str, run: Path) -> None:
        names = list(COMMANDS)
        earlier = None if stage in ("open", "replay") else names[names.index(stage) - 1]
        if earlier is None:
            run.parent.mkdir(parents=True, exist_ok=True)
        else:
            shutil.copytree(self.done(earlier)[0], run)

    @contextmanager
    def fresh(self, stage: str) -> Iterator[Path]:
        """A run that the stage has still to work on."""
        self.done(stage)
        run = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        self._copy_before(stage, run)
        try:
            yield run
        finally:
            shutil.rmtree(run.parent)

    def run(self, stage: str, run: Path, fault: Fault | None = None) -> Counted:
        return self.server.run(self.command(stage, run), run, fault)

    def again(self, stage: str, run: Path) -> Ended:
        return self.run(stage, run).ended

    def numbers(self, stage: str, call: str, at_most: int) -> list[int]:
        """Which of a stage's calls of a kind to interfere with: all, or some that lie evenly, at a place drawn by name."""
        count = self.done(stage)[1][call]
        if is_full() or count <= at_most:
            return list(range(1, count + 1))
        start = Random(f"{stage} {call}").random()
        return [int((step + start) * count / at_most) + 1 for step in range(at_most)]
