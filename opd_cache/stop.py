"""Being asked to stop: by a signal that is noted until a step has ended, or that ends the process where it finds it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from subprocess import Popen
from types import FrameType
from typing import NoReturn

from opd_cache.errors import TryAgainError, error_line
from opd_cache.store.publish import drop_unfinished_files

# What Slurm sends before a time limit (as --signal=USR1 asks) and before preemption, and what `kill` sends.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE_S = 2.0  # for a stopped process to put things away
LAST_WORDS_S = 1.0


@dataclass
class StopRequest:
    """The name of the first signal that came, or None."""

    signal_name: str | None = None


class StoppedError(SystemExit):
    """Raised wherever the main thread is. A SystemExit: no `except Exception` takes it for a fault, and an event loop, which
    swallows other exceptions of a callback, lets it through."""


@contextlib.contextmanager
def stopping_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the block at once. Raises TryAgainError.

    A process that is still there GRACE_S later, held by a thread or by what swallowed the exception, is ended.
    """
    request = StopRequest()
    is_told = threading.Event()

    def line() -> str:
        return f"stopped by {request.signal_name}; the same command goes on from what is published."

    def end() -> None:
        end_process(None if is_told.is_set() else line())

    def stop(number: int) -> None:
        if request.signal_name is not None:
            return  # what the first one has begun to put away must not be interrupted
        request.signal_name = signal.Signals(number).name
        ending = threading.Timer(GRACE_S, end)
        ending.daemon = True
        ending.start()
        raise StoppedError(TryAgainError.exit_status)

    try:
        with _handled(stop), _quiet_destructors():
            yield
    except StoppedError:
        is_told.set()
        raise TryAgainError(line()) from None


@contextlib.contextmanager
def noted_signals(processes: Sequence[Popen] = ()) -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1 instead of dying of them, and pass them on to `processes`.

    One that came and that the block did not answer by raising comes again behind it, for whoever handles it there.
    """
    request = StopRequest()

    def note(number: int) -> None:
        request.signal_name = request.signal_name or signal.Signals(number).name
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with _handled(note):
        yield request
    if request.signal_name is not None and callable(signal.getsignal(signal.Signals[request.signal_name])):
        signal.raise_signal(signal.Signals[request.signal_name])


@contextlib.contextmanager
def _quiet_destructors() -> Iterator[None]:
    """Python prints what is raised in a __del__ and goes on: a stop that came there is carried out after GRACE_S."""
    former = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, StoppedError):
            former(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = former


@contextlib.contextmanager
def _handled(handle: Callable[[int], None]) -> Iterator[None]:
    """Give both signals to `handle`. Outside the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def end_process(line: str | None) -> NoReturn:
    """End with TryAgainError's status and this line, from any thread, whatever the main one is blocked in."""
    # Standard error and the run may lie on the very file system that hangs.
    last_words = threading.Thread(target=_put_away, args=(line,), daemon=True)
    last_words.start()
    last_words.join(LAST_WORDS_S)
    os._exit(TryAgainError.exit_status)


def _put_away(line: str | None) -> None:
    with contextlib.suppress(OSError):
        if line is not None:
            # Not through sys.stderr: the main thread may hold its lock.
            os.write(2, f"{error_line(TryAgainError.__name__, line)}\n".encode())
        drop_unfinished_files()
