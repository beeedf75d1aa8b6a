"""The bytes of one file: written, made durable, read back. And what a disk that fails is called."""

import contextlib
import errno
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from opd_cache.errors import DiskError, OpdCacheError, TryAgainError, causes

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A file server that has lost a handle gives a new one to whoever opens the file again.
PASSING = {errno.ESTALE}
FAILING = {errno.EIO, errno.EROFS}
UNPUBLISHED = "Nothing unfinished was published"
TOLD_ERRNO = re.compile(r"\((?:os error )?(\d+)\)")
ARROW_CLOSE = "error closing file"  # all that Arrow says of it
PIECE_BYTES = 1 << 20


def disk_error(error: BaseException, path: Path | str) -> OpdCacheError | None:
    """What a failing disk is called: TryAgainError where the same command may succeed later, else DiskError; None for
    what is no fault of a disk."""
    number = next((number for one in causes(error) for number in _numbers(one)), 0)
    said = f"{path}: {os.strerror(number)}. {UNPUBLISHED}"
    if number in NO_SPACE:
        return TryAgainError(f"{said}; make room and run the same command again.")
    if number in PASSING:
        return TryAgainError(f"{said}; run the same command again.")
    if number in FAILING:
        return DiskError(f"{said}; see to the disk and run the same command again.")
    return None


def _numbers(error: BaseException) -> Iterator[int]:
    """The disk's errno that an error has; safetensors and torch tell it in the text of exceptions of their own."""
    known = NO_SPACE | PASSING | FAILING
    if isinstance(error, OSError) and error.errno in known:
        yield error.errno
    if str(error) == ARROW_CLOSE:
        yield errno.EIO
    numbers = map(int, TOLD_ERRNO.findall(str(error)))
    yield from (number for number in numbers if number in known and os.strerror(number) in str(error))


@contextlib.contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a failing disk into TryAgainError and DiskError."""
    try:
        yield
    except OpdCacheError:
        raise
    except Exception as error:
        if explained := disk_error(error, path):
            raise explained from error
        raise


class _Recorded(io.FileIO):
    """A new file that keeps the digest of all that the disk took."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self.digest = xxhash.xxh3_128()

    def write(self, data: object) -> int:
        size = super().write(data)  # type: ignore[arg-type]
        self.digest.update(memoryview(data).cast("B")[:size])  # type: ignore[arg-type]
        return size


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written from its beginning to its end. Behind the block it is durable, and what can be read of it is
    what was written. Raises DiskError."""
    raw = _Recorded(path)
    with io.BufferedWriter(raw) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    if _digest(path) != raw.digest.digest():
        raise unlike_written(path)


def unlike_written(path: Path) -> DiskError:
    return DiskError(f"{path}: reads back otherwise than it was written. {UNPUBLISHED}; see to the disk and run again.")


def _digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.digest()


def write_whole(path: Path, data: bytes) -> None:
    """A new file with these bytes."""
    with new_file(path) as file:
        file.write(data)


def remove_folder(path: Path) -> None:
    """Remove a temporary folder as far as that can be done; gc finds what is left."""
    # Where a close fails, Python closes again, and raises that in spite of ignore_errors.
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
