"""Putting a file or a folder under its final name: whole, durable, and never changed afterwards.

Temporary on the same file system → write → fsync → read back → link(temporary, final) → fsync the folder → unlink.
`link` is exclusive, so of racing writers the first wins; `rename` would let the last one replace a published file.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from opd_cache.errors import CorruptShardError, MismatchError, MissingInputError
from opd_cache.garbage import no_garbage_collection
from opd_cache.run_dir import SCHEMA_VERSION
from opd_cache.store.disk import explained_disk_errors, fsync_path, new_file, remove_folder, write_whole
from opd_cache.store.shapes import check_shape, check_version

# Another file system, one without hard links, too many links, a file of another user.
NO_LINK = {errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.EPERM}
TEMPORARY_SUFFIX = ".tmp"
DIGEST = "digest"  # key of a published JSON object
MAX_DIFFERENCES = 5  # named in one error line
_unfinished: set[Path] = set()  # temporary files that this process is writing


def temporary_beside(final: Path) -> Path:
    """A fresh hidden name in the same folder that says which process made it: .NAME.HOST.PID.RANDOM.tmp"""
    return final.with_name(
        f".{final.name}.{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}{TEMPORARY_SUFFIX}"
    )


def make_folder(path: Path) -> None:
    """Create a folder and its parents; their entries are durable when this returns."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def publish_file(final: Path, write: Callable[[BinaryIO], None], check: Callable[[Path], None]) -> bool:
    """Write a file and publish it; True when ours is the one, False when another was there first.

    `write` gets the open temporary file; `check` reads a file back and raises when it is not whole. It is called on
    our temporary before the link and, when we lose, on the winner.
    """
    temporary = temporary_beside(final)
    with explained_disk_errors(final):
        make_folder(final.parent)
        _unfinished.add(temporary)
        try:
            with new_file(temporary) as file:
                write(file)
            check(temporary)
            try:
                os.link(temporary, final)
                won = True
            except FileExistsError:
                check(final)
                won = False
            fsync_path(final.parent)
            return won
        finally:
            temporary.unlink(missing_ok=True)
            _unfinished.discard(temporary)


def replace_file(final: Path, text: str, is_program: bool = False) -> None:
    """Put a text in the place of what has its name, whole or not at all; of a symbolic link, not of what it leads to.

    For what may change: notes, batch scripts. As readable as the umask says.
    """
    temporary = temporary_beside(final)
    with explained_disk_errors(final):
        make_folder(final.parent)
        try:
            write_whole(temporary, text.encode())
            if is_program:
                mode = temporary.stat().st_mode
                temporary.chmod(mode | (mode & 0o444) >> 2)  # may be run by whoever may read it
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of the run; a symbolic link in its place is refused by the system."""
    with explained_disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def drop_unfinished_files() -> None:
    """Remove this process's temporary files, for when it is ended from another thread than the one that writes them."""
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


def publish_link(source: Path, final: Path) -> None:
    """Give a published file a second name: a hard link, or a whole copy where there can be none.

    Raises MismatchError when that name belongs to another file.
    """

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file)

    def check(path: Path) -> None:
        if not path.samefile(source) and digest_file(path) != digest_file(source):
            raise MismatchError(f"{path}: another file than {source}. Move one of them away and run the command again.")

    if final.exists():
        check(final)
        return
    with explained_disk_errors(final):
        make_folder(final.parent)
        try:
            os.link(source, final)
            fsync_path(final.parent)
        except FileExistsError:
            check(final)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            publish_file(final, write, check)


def signed_json(content: dict[str, Any]) -> bytes:
    """The one byte form of a JSON object: sorted keys, one line a top-level key for people to read, and the sha256 of
    all that as one more key, so that a damaged file is known by itself."""
    lines = {key: _line(key, value) for key, value in content.items()}
    return _together({**lines, DIGEST: _line(DIGEST, digest_bytes(_together(lines)))})


def _line(key: str, value: Any) -> str:
    return f"{json.dumps(key)}: {json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)}"


def _together(lines: dict[str, str]) -> bytes:
    return ("{\n" + ",\n".join(line for _, line in sorted(lines.items())) + "\n}\n").encode()


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_json(
    final: Path, content: dict[str, Any], what: str, remedy: str, compare: tuple[str, ...] | None = None
) -> str:
    """Publish a JSON object, or confirm that the published one says the same; returns the sha256 of the file.

    Raises MismatchError naming what differs by dotted path (only top-level keys in `compare` where given), `what` the
    file stands for and the `remedy`.
    """
    data = signed_json(content)
    if not final.exists():

        def write(file: BinaryIO) -> None:
            file.write(data)

        def check(path: Path) -> None:
            read_json(path)

        if publish_file(final, write, check):
            return digest_bytes(data)
    found = read_json(final)
    keys = compare or {*found, *content}
    ours, theirs = ({key: side.get(key) for key in keys} for side in (json.loads(signed_json(content)), found))
    differing = list(islice(_differences(theirs, ours, ""), MAX_DIFFERENCES + 1))
    if differing:
        shown = [*differing[:MAX_DIFFERENCES], *(["..."] if len(differing) > MAX_DIFFERENCES else [])]
        raise MismatchError(
            f"{final}: {what} was made with {'; '.join(shown)}{'' if shown[-1] == '...' else '.'} {remedy}"
        )
    return digest_file(final)


def _differences(found: Any, wanted: Any, path: str) -> Iterator[str]:
    """`settings.learning_rate = 0.001, now 0.002`, for each value that differs, however deep it lies."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif _is_list_of_dicts(found) and _is_list_of_dicts(wanted) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    else:
        yield f"{path} = {_short(found)}, now {_short(wanted)}"


def _is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(item, dict) for item in value)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{len(value)} keys}}"
    if _is_list_of_dicts(value):
        return f"[{len(value)} entries]"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path) -> dict[str, Any]:
    """A published JSON object, its digest and its shape checked and the digest left out.

    Raises MissingInputError, CorruptShardError, MismatchError (another schema version).
    """
    data, content = _json_object(path)
    content.pop(DIGEST, None)
    if not _is_signed(content, data):
        raise CorruptShardError(
            f"{path}: damaged or edited, its {DIGEST} does not fit. Move the file away and run the stage again."
        )
    check_version(content.get("schema_version", SCHEMA_VERSION), path)
    check_shape(content, path)
    return content


def _is_signed(content: dict[str, Any], data: bytes) -> bool:
    try:
        return signed_json(content) == data
    except (ValueError, RecursionError):  # NaN, half of a surrogate pair, too deep: we write none of them
        return False


def read_plain_json(path: Path) -> dict[str, Any]:
    """A JSON object that is not signed: a note, or what a manifest vouches for. Raises the same."""
    content = _json_object(path)[1]
    check_shape(content, path)
    return content


def _json_object(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        data = path.read_bytes()
        with no_garbage_collection():
            content = json.loads(data)
    except FileNotFoundError as error:
        raise MissingInputError(f"{path}: no such file.") from error
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptShardError(
            f"{path}: not whole JSON ({error}). Move the file away and run the stage again."
        ) from error
    if not isinstance(content, dict):
        raise CorruptShardError(
            f"{path}: expected a JSON object, found a {type(content).__name__}. Move the file away and run the stage again."
        )
    return data, content


def publish_folder(final: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a temporary folder and rename it to its final name; False when another was there first.

    A rename onto a folder that holds files fails, so a published folder is never replaced.
    """
    temporary = temporary_beside(final)
    with explained_disk_errors(final):
        make_folder(final.parent)
        try:
            temporary.mkdir()
            fill(temporary)
            readable = temporary.stat().st_mode & 0o666  # as the umask says; safetensors makes files for its user alone
            for path in (*temporary.rglob("*"), temporary):
                if path.is_file():
                    path.chmod(readable)
                fsync_path(path)
            try:
                os.rename(temporary, final)
                won = True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise OSError(error.errno, error.strerror, str(final)) from error
                won = False
            fsync_path(final.parent)
            return won
        finally:
            remove_folder(temporary)
