"""Damaging files of a run whose undamaged copies share their bytes: nothing is ever written in place."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from oracle import assert_intact

from opd_cache.errors import StoreError
from opd_cache.verify.run import verify_run

CUT = "file cut at any length"
FLIP_SMALL = "bit flipped in a small shard or a JSON file"
FLIP_LARGE = "bit flipped in a large shard"
FLIP_WEIGHTS = "bit flipped in weights or optimizer state"
GONE = "file deleted"
MISPLACED = "file swapped, foreign, older, newer or doubled"


def link_copy(source: Path, target: Path) -> Path:
    """A copy of a run that shares the bytes of its files."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def put(path: Path, data: bytes | None) -> None:
    """Other bytes under a name, or none."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


@contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """Other bytes under a name for as long as the block lasts."""
    whole = path.read_bytes()
    put(path, data)
    try:
        yield
    finally:
        put(path, whole)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def drawn(name: str, limit: int, count: int) -> list[int]:
    """Numbers below a limit, the same in every session."""
    rng = random.Random(name)
    return sorted(rng.sample(range(limit), min(count, limit)))


def files_of(run: Path) -> list[str]:
    """Everything that a run has published, checkpoints included."""
    files = (str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.is_file())
    return [name for name in files if not name.startswith("logs/")]


def assert_found(run: Path, before: dict[str, bytes], name: str) -> None:
    """verify names the damaged file and no other. run.json says what run this is: without it verify refuses."""
    if name == "run.json":
        with pytest.raises(StoreError, match=name):
            verify_run(run)
    else:
        assert_intact(run, before, [name])
