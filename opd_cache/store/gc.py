"""Leftovers of dead processes: temporary files and folders that nothing will ever publish."""

import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from opd_cache.store.disk import remove_folder
from opd_cache.store.publish import TEMPORARY_SUFFIX

# .NAME.HOST.PID.RANDOM.tmp, as publish.temporary_beside makes them.
TEMPORARY = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))


def dead_temporaries(folder: Path, min_age_s: float) -> Iterator[tuple[Path, int]]:
    """(path, bytes) of every temporary below a folder whose writer is gone.

    A process of this machine is gone when its pid is; of another one, when it has not written for min_age_s.
    """
    now = _file_system_time(folder)
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if TEMPORARY.fullmatch(name) and _is_dead(path, now - min_age_s):
                yield path, _size(path)
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]


def remove_temporary(path: Path) -> None:
    """Remove one; that it is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _file_system_time(folder: Path) -> float:
    """Now, by the clock that dates the folder's files: this machine's may be an hour ahead of it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # where nothing can be written, nothing will be removed
        return time.time()


def _is_dead(path: Path, oldest: float) -> bool:
    made_by, pid, _ = path.name.removesuffix(TEMPORARY_SUFFIX).rsplit(".", 2)
    if made_by.endswith(f".{socket.gethostname()}") and Path("/proc/self").exists():
        return not Path(f"/proc/{pid}").exists()
    return max((entry.stat().st_mtime for entry in _entries(path)), default=0.0) <= oldest


def _size(path: Path) -> int:
    return sum(entry.stat().st_size for entry in _entries(path) if entry.is_file())


def _entries(path: Path) -> list[Path]:
    """The path and all below it, those left out that vanish meanwhile."""
    return [entry for entry in (path, *path.rglob("*")) if entry.exists()]
