"""_COMPLETE.json: which files a policy or a checkpoint is made of. Who writes one: opd_cache/learn/checkpoint.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, MismatchError
from opd_cache.run_dir import COMPLETE, TRAINER
from opd_cache.store.publish import digest_file, read_json


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a policy or checkpoint says of itself. Raises CorruptShardError where the folder is there without it."""
    if folder.is_dir() and not (folder / COMPLETE).exists():
        raise CorruptShardError(f"{folder}: has no {COMPLETE}. Move the folder away and run the stage again.")
    return read_json(folder / COMPLETE)


def check_place(manifest: dict[str, Any], run_id: str, version: int, folder: Path) -> None:
    """Refuse a policy or checkpoint of another run or version. Raises MismatchError."""
    for key, wanted in {"run_id": run_id, "policy_version": version}.items():
        if (found := manifest.get(key)) != wanted:
            raise MismatchError(
                f"{folder}: made for {key} = {found!r}, expected {wanted!r}: it belongs elsewhere. Move the folder away and run the stage again."
            )


def check_files(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The manifest, after every wanted file was compared with it. Raises CorruptShardError."""
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / name
        if is_wanted(name) and not (path.is_file() and digest_file(path) == digest):
            raise CorruptShardError(
                f"{path}: {'changed' if path.is_file() else 'missing'} since it was published. Move {folder} away and run the stage again."
            )
    return manifest


def check_model_files(folder: Path) -> dict[str, Any]:
    """The same for what a model is loaded from: all but the trainer's files."""
    return check_files(folder, lambda name: not name.startswith(f"{TRAINER}/"))
