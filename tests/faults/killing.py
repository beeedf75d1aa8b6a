"""Commands in process groups of their own, killed from outside with all of their processes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence


def run_until(command: Sequence[str], is_time: Callable[[], bool]) -> int:
    """The status of a command whose process group is killed as soon as it is time, unless it is over before."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        while process.poll() is None and not is_time():
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
