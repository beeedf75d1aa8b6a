"""What the tests of a hostile surrounding share: runs that a command has still to work on, and other users."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="to run commands as another user takes root")

# What of a finished run is gone when a command has still to make it.
MADE_BY = {
    "rollout --episode 0": ("episode=0", "episode=1", "evals"),
    "rollout --episode 1": ("episode=1", "evals/policy=2"),
    "score --episode 1": ("episode=1/scores", "episode=1/learn", "episode=1/policy", "evals/policy=2"),
    "learn --episode 1": ("episode=1/learn", "episode=1/policy", "evals/policy=2"),
    "eval --policy-version 2": ("evals/policy=2",),
    "run": ("run.json", "prompts.parquet", "vocab.parquet", "eval_prompts.parquet", "episode=0", "episode=1", "evals"),
}


def remove(run: Path, names: Sequence[str]) -> None:
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def give_to(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)
