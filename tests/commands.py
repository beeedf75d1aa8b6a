"""A command that is watched and signalled while it runs."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SOON_S = 20.0  # on a machine with much other work; that nothing was finished first is seen by the shards
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


class Command:
    """`opd-cache ARGUMENTS` while it runs."""

    def __init__(self, process: subprocess.Popen, begun: Path) -> None:
        self.process, self.begun = process, begun

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_there():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ends(self, within_s: float) -> str:
        """Its one line. Nothing else is printed than the usual log."""
        _, errors = self.process.communicate(timeout=within_s)
        *log, line = errors.splitlines()
        assert self.process.returncode == 75, errors
        assert [other for other in log if not LOG_LINE.match(other)] == []
        return line

    def stops(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        assert self.ends(SOON_S) == (
            f"TryAgainError: stopped by {number.name}; the same command goes on from what is published."
        )
