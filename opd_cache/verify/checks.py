"""What a check of a run is, what it finds, and the smallest ones: of one file."""

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError, StoreError
from opd_cache.run_dir import RolloutSet, RunDir
from opd_cache.store.plans import load_rollout_plan, rollout_shards
from opd_cache.store.publish import digest_file, read_json

# What an OSError says of the file itself.
OF_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
POLICY_FOLDER = re.compile(r"policy=[0-9]+")


@dataclass(frozen=True)
class Finding:
    """Something that is not what it should be."""

    file: Path
    problem: str
    moves: tuple[Path, ...]  # what must leave the run to open it again
    again: tuple[str, ...]  # the commands that then make it anew; without both only a person can mend it


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

    def name(self, path: Path) -> str:
        """A file's path inside the run directory."""
        return str(path.relative_to(self.run.path))


def single(path: Path, work: Callable[[], object], moves: tuple[Path, ...], *again: str) -> Check:
    """A check that fails as a whole."""

    def find() -> Iterator[Finding]:
        try:
            work()
        except (StoreError, OSError) as error:
            raise_if_not_of_file(error)
            yield Finding(path, str(error), moves, again)

    return Check((path,), find)


def raise_if_not_of_file(error: Exception) -> None:
    """A file that we may not read, or have no memory for, is not found damaged: raises the error again."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_FILE:
        raise error


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


def gone(path: Path, why: str) -> StoreError:
    return MissingInputError(f"{path}: missing, though {why}")


def misplaced(path: Path, made_as: str, place: str) -> StoreError:
    return MismatchError(f"{path}: made for {made_as}, it lies in {place}")


def is_aside(name: str, made_as: str, known: Known) -> bool:
    """Whether somebody has put a folder aside under another name: `policy=3.old`, `teacher=main-before`."""
    own = {f"teacher={teacher}" for teacher in known.identity["recipe"]["teachers"]}
    is_own = name.partition(",")[0] in own or POLICY_FOLDER.fullmatch(name)
    return name != made_as and name.startswith(made_as) and not is_own


def file_digest(path: Path) -> str:
    """Raises MissingInputError where there is no file that can be read."""
    try:
        return digest_file(path)
    except OSError as error:
        raise_if_not_of_file(error)
        raise MissingInputError(f"{path}: {error.strerror}") from error


def sealed_digest(target: RolloutSet) -> str | None:
    """Of the rollouts' seal, where it is the one of these rollouts; one that is not is a finding of its own."""
    try:
        shards = rollout_shards(target, load_rollout_plan(target))
        shards.check_seal(read_json(shards.seal_path))
        return digest_file(shards.seal_path)
    except StoreError:
        return None


def digest_of(path: Path) -> str | None:
    """Of a JSON file that is there and whole; one that is not is a finding of its own."""
    try:
        read_json(path)
        return digest_file(path)
    except StoreError:
        return None
