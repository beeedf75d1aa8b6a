"""A process in which nothing moves any more: nobody else can tell it from one that is slow."""

import _thread
import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from opd_cache.stop import end_process

TICKS = 20  # looks at the progress in one timeout
_latest = ("the start",)  # a new tuple at every sign of progress


def note_progress(what: str) -> None:
    """Say that something has moved, and what."""
    global _latest
    _latest = (what,)


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """A piece of work that shows no progress inside, such as loading a model: its beginning and its end are some."""
    note_progress(f"the beginning of {what}")
    yield
    note_progress(f"the end of {what}")


@contextlib.contextmanager
def stall_watch(timeout_s: float | None) -> Iterator[None]:
    """End the process with TryAgainError's status when the block shows no progress for so long; None: never.

    It ends even where the main thread is blocked in a system call or in C code, as long as that lets other threads run.
    """
    if timeout_s is None:
        yield
        return
    is_over = threading.Event()
    note_progress("the start")
    # Thread.start would wait for ever for a thread that found no memory to begin with.
    _thread.start_new_thread(_watch, (timeout_s, is_over))
    try:
        yield
    finally:
        is_over.set()


def _watch(timeout_s: float, is_over: threading.Event) -> None:
    seen, idle = _latest, 0
    # Its own waits are counted, not the time that has passed: a job that was suspended for hours has not stalled.
    while not is_over.wait(timeout_s / TICKS):
        idle = idle + 1 if seen is _latest else 0
        seen = _latest
        if idle >= TICKS:
            end_process(
                f"no progress for {timeout_s:g} s (stall_timeout_s) since {seen[0]}; the process was in {_main_place()}. The same command goes on from what is published."
            )


def _main_place() -> str:
    """The line that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "no Python code" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
