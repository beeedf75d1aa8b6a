"""What all tests of hostile input ask: it works, or it is one line; and nothing else was touched, in bounded time and memory."""

import io
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from fault_log import SilentError, is_full
from hypothesis import HealthCheck, settings

from opd_cache.cli import main
from opd_cache.errors import OpdCacheError, error_line

MAX_CPU_SECONDS = 20.0
MAX_MIB = 600
# Files that are opened to be written, changes of names, and other programs.
WRITING = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "shutil.rmtree", "shutil.move", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
}  # fmt: skip


def examples(few: int, many: int) -> settings:
    """Always the same few examples, or with FAULTS=full many new ones."""
    return settings(
        max_examples=many if is_full() else few,
        derandomize=not is_full(),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def ran(*arguments: object) -> Ended:
    """`opd-cache ARGUMENTS` in this process. Any exception is one that a user would see as a traceback."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["opd-cache", *map(str, arguments)]
    status = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.argv = before
    return Ended(status, out.getvalue(), err.getvalue())


def answered_or_refused(*arguments: object, statuses: tuple[int, ...] = (2,)) -> Ended:
    """The same; it must be done, or be one line with one of these statuses."""
    with bounded():
        ended = ran(*arguments)
    if ended.status:
        assert ended.status in statuses, ended
        (line,) = ended.err.splitlines()
        assert line.isprintable(), ascii(line)
        assert len(line) < 3000, len(line)
    return ended


@contextmanager
def refusal() -> Iterator[list[str]]:
    """Whatever is refused inside is one line, which is in the list then."""
    said: list[str] = []
    try:
        with bounded():
            yield said
    except OpdCacheError as error:
        said.append(error_line(type(error).__name__, str(error)))
        assert said[0].isprintable()
        assert len(said[0]) < 3000


@contextmanager
def bounded() -> Iterator[None]:
    """Neither long nor with much memory."""
    start, before = time.process_time(), _peak_mib()
    yield
    assert time.process_time() - start < MAX_CPU_SECONDS
    assert _peak_mib() - before < MAX_MIB


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class _Watch:
    """An audit hook cannot be removed, only told to look away."""

    def __init__(self) -> None:
        self.inside: tuple[Path, ...] | None = None
        self.seen: list[str] = []
        self.is_hooked = False

    def hook(self, event: str, arguments: tuple) -> None:
        if self.inside is None:
            return
        is_written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        is_written = is_written or (event == "open" and arguments[1] is None and arguments[2] & 0o3)
        if not is_written and event not in WRITING:
            return
        if event not in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"):
            names = [name for name in arguments[: 1 if event == "open" else 2] if isinstance(name, str | bytes | Path)]
            # What is removed in a tree is named within its open folder.
            is_within = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
            folder = Path(f"/proc/self/fd/{arguments[1]}" if is_within else "")
            if all(self._is_inside(folder / os.fsdecode(name)) for name in names):
                return
        self.seen.append(f"{event}{arguments!r}"[:300])

    def _is_inside(self, path: Path) -> bool:
        inside, self.inside = self.inside or (), None  # what is asked here is not to be watched
        try:
            where = path.parent.resolve() / path.name
            is_import = "__pycache__" in path.parts
            return is_import or any(map(where.is_relative_to, (*inside, "/dev", "/proc")))
        finally:
            self.inside = inside


_watch = _Watch()


@contextmanager
def touching_only(*folders: Path) -> Iterator[None]:
    """Python writes, renames and removes nothing outside of these, and starts no program."""
    if not _watch.is_hooked:
        sys.addaudithook(_watch.hook)
        _watch.is_hooked = True
    _watch.inside, _watch.seen = tuple(folder.resolve() for folder in folders), []
    try:
        yield
    finally:
        _watch.inside = None
    if _watch.seen:
        raise SilentError(f"touched outside of {folders}: {_watch.seen[0]}")


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
