"""Several processes of this machine that run one command together, as torchrun would start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from opd_cache.errors import OpdCacheError, TryAgainError
from opd_cache.stop import noted_signals

# How long the others may take to notice that a rank is gone.
GRACE_S = 10.0
POLL_S = 0.05


class RankFailedError(OpdCacheError):
    """A rank ended with an error that it has already printed."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def run_ranks(arguments: Sequence[str], num_ranks: int) -> None:
    """Run `opd-cache ARGUMENTS` as ranks 0 … num_ranks − 1, to their end. SIGTERM and SIGUSR1 are passed on to them.

    When one fails, the others are ended. Raises TryAgainError when they stopped with its status, RankFailedError on any
    other failure.
    """
    port = str(_free_port())
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    shared = {"OMP_NUM_THREADS": threads, **os.environ}
    shared |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "opd_cache", *arguments]
    processes: list[subprocess.Popen] = []
    try:
        with noted_signals(processes) as request:
            for rank in range(num_ranks):
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))
            if request.signal_name is None:
                _wait(processes)
                _check(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen]) -> None:
    """Until all have ended, or one has failed and the others had their time to notice."""
    deadline: float | None = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def _check(processes: Sequence[subprocess.Popen]) -> None:
    if failed := [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]:
        raise _failure(failed)


def _failure(failed: list[tuple[int, int]]) -> OpdCacheError:
    # Ranks that lose a partner stop with TryAgainError's status: a signal, else any other status, says more.
    rank, status = min(failed, key=lambda entry: (entry[1] == TryAgainError.exit_status, entry))
    if status < 0:
        return TryAgainError(
            f"rank {rank} was ended by {signal.Signals(-status).name}. The same command goes on from the last checkpoint."
        )
    if status == TryAgainError.exit_status:
        return TryAgainError("the ranks stopped; see above. The same command goes on from what is published.")
    return RankFailedError(f"rank {rank} ended with status {status}; see above.", status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """A killed launcher leaves no rank behind that would go on writing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
