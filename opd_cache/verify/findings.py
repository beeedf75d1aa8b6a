"""What a check of a run is, and what it finds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, StoreError
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import digest_file, read_json


@dataclass(frozen=True)
class Finding:
    """Something that is not what it should be."""

    file: Path
    problem: str
    moves: tuple[Path, ...]  # what must leave the run to open it again; nothing where only a person can mend it
    again: tuple[str, ...]  # the commands that then make it anew


@dataclass(frozen=True)
class Check:
    """Files to be read together, and what does it."""

    files: tuple[Path, ...]
    find: Callable[[], Iterator[Finding]]


@dataclass(frozen=True)
class Known:
    """What the whole run is compared with."""

    run: RunDir
    identity: dict[str, Any]
    vocab_size: int | None


def single(path: Path, work: Callable[[], object], moves: tuple[Path, ...], *again: str) -> Check:
    """A check that fails as a whole."""

    def find() -> Iterator[Finding]:
        try:
            work()
        except (StoreError, OSError) as error:
            yield Finding(path, str(error), moves, again)

    return Check((path,), find)


def unchanged(path: Path, wanted: str, said_by: str, moves: tuple[Path, ...], *again: str) -> Check:
    """Compare a file with its digest."""

    def work() -> None:
        if (found := digest_file(path)) != wanted:
            raise CorruptShardError(f"{path}: its sha256 is {found[:12]}…, {said_by} says {wanted[:12]}…")

    return single(path, work, moves, *again)


def broken(path: Path, error: Exception, moves: tuple[Path, ...], *again: str) -> Check:
    def work() -> None:
        raise error

    return single(path, work, moves, *again)


def digest_of(path: Path) -> str | None:
    """Of a JSON file that is there and whole; one that is not is a finding of its own."""
    try:
        read_json(path)
        return digest_file(path)
    except StoreError:
        return None
