"""_COMPLETE.json: which files a policy or a checkpoint is made of. Who writes one: opd_cache/learn/checkpoint.py."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, MismatchError
from opd_cache.run_dir import COMPLETE, TRAINER
from opd_cache.store.publish import digest_file, read_json

SIDE_BY_SIDE_BYTES = 256 << 20


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
    wanted = {folder / name: digest for name, digest in manifest["files"].items() if is_wanted(name)}
    for path, found in zip(wanted, digests(list(wanted)), strict=True):
        if found != wanted[path]:
            raise CorruptShardError(
                f"{path}: {'missing' if found is None else 'changed'} since it was published. Move {folder} away and run the stage again."
            )
    return manifest


def digests(paths: Sequence[Path]) -> Iterator[str | None]:
    """Of each file; None where there is none. Large ones side by side: a core reads 1.4 GB/s."""
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    if sum(sizes) < SIDE_BY_SIDE_BYTES:
        yield from map(_digest, paths)
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(_digest, paths)


def _digest(path: Path) -> str | None:
    return digest_file(path) if path.is_file() else None


def check_model_files(folder: Path) -> dict[str, Any]:
    """The same for what a model is loaded from: all but the trainer's files."""
    return check_files(folder, lambda name: not name.startswith(f"{TRAINER}/"))
