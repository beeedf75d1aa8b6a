"""Being asked to stop: a signal is noted, and the learner ends at the end of its step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

# What Slurm sends before a time limit (as --signal=USR1 asks) and before preemption, and what `kill` sends.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopRequest:
    """The name of the first signal that came, or None."""

    signal_name: str | None = None


@contextlib.contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1 instead of dying of them. Outside the main thread nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_name = request.signal_name or signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
