"""Folders with everything that learning needs to go on: a plain Hugging Face model and, in trainer/, the optimizer.

An episode's last one is its policy/. The manifest _COMPLETE.json lists every file with its digest.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import MismatchError
from opd_cache.fingerprint import fingerprint_model
from opd_cache.run_dir import COMPLETE, TRAINER
from opd_cache.store.disk import fsync_path, remove_folder, write_whole
from opd_cache.store.manifest import check_files, digests, read_manifest
from opd_cache.store.publish import (
    publish_folder,
    read_json,
    read_plain_json,
    signed_json,
    temporary_beside,
)

STATE = "state.json"
STEPS = "steps.parquet"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


@dataclass(frozen=True)
class TrainerState:
    """Where learning stands."""

    step: int  # optimizer steps of the whole run
    cursor: int  # rollouts of this episode already learned, in planned order
    steps: list[dict[str, Any]]  # metrics of this episode's steps so far


def publish_checkpoint(final: Path, about: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """Publish a checkpoint folder that `fill` writes; False when another process was first.

    Raises CorruptShardError when what was there first is no checkpoint.
    """

    def whole(folder: Path) -> None:
        fill(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [str(path.relative_to(folder)) for path in paths]
        with ThreadPoolExecutor(1) as disk:  # it writes while the digests are computed
            flushing = disk.submit(_flush, paths)
            files = dict(zip(names, digests(paths), strict=True))
            flushing.result()
        content = {**about, "fingerprint": fingerprint_model(folder), "files": files}
        write_whole(folder / COMPLETE, signed_json(content))

    won = publish_folder(final, whole)
    if not won:
        with contextlib.suppress(FileNotFoundError):  # its owner may have removed the checkpoint again
            if COMPLETE not in os.listdir(final):
                read_manifest(final)
    return won


def _flush(paths: Sequence[Path]) -> None:
    for path in paths:
        fsync_path(path)


def write_state(folder: Path, state: TrainerState) -> None:
    (folder / TRAINER).mkdir(exist_ok=True)
    content = {"step": state.step, "cursor": state.cursor, "steps": state.steps}
    write_whole(folder / TRAINER / STATE, json.dumps(content).encode())


def read_state(folder: Path) -> TrainerState:
    """The state in a checkpoint or policy of this run. Raises CorruptShardError."""
    check_files(folder, lambda name: name == f"{TRAINER}/{STATE}")
    return TrainerState(**read_plain_json(folder / TRAINER / STATE))


def latest_checkpoint(learn_folder: Path, plan_digest: str) -> Path | None:
    """The newest checkpoint inside an episode. Raises MismatchError when it belongs to another plan."""
    found = sorted(folder for folder in learn_folder.glob("checkpoint-*") if (folder / COMPLETE).exists())
    if not found:
        return None
    made_for = read_json(found[-1] / COMPLETE)["plan"]
    if made_for != plan_digest:
        raise MismatchError(
            f"{found[-1]}: the checkpoint was made for another plan ({made_for[:12]}, now {plan_digest[:12]}). Move it away to start the episode's learning again."
        )
    return found[-1]


def remove_checkpoints(learn_folder: Path, keep_last: int = 0, keep_every: int | None = None) -> None:
    """Drop the checkpoints that later ones, or the policy, have made useless: all but the newest `keep_last`, and those
    at multiples of `keep_every` steps."""
    found = sorted(learn_folder.glob("checkpoint-[0-9]*[0-9]"))
    for folder in found[: len(found) - keep_last]:
        if keep_every is None or int(folder.name.rpartition("-")[2]) % keep_every:
            if folder.is_symlink():
                continue  # somebody's own, outside of the run
            # Under its own name a checkpoint is whole, while it is being removed too.
            leaving = temporary_beside(folder)
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, leaving)
            remove_folder(leaving)


def copy_model_files(source: Path, target: Path, existing: Sequence[str]) -> None:
    """Copy what makes a model loadable beside its weights and is not there yet: tokenizer, templates, settings."""
    for path in sorted(source.iterdir()):
        skip = path.name == COMPLETE or path.name in existing or path.name.endswith(WEIGHT_SUFFIXES)
        if path.is_file() and not skip:
            write_whole(target / path.name, path.read_bytes())
