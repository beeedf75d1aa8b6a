"""The tests' side of worker.py: the store's work in forked children, which tests can kill, starve or race."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a child ended: exit status (negative: the signal that killed it) and what it said."""

    status: int
    said: str


class Worker:
    """One worker.py and its children."""

    def __init__(self, warm_folder: Path, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, str(Path(__file__).with_name("worker.py")), str(warm_folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, work: str, folder: Path, **job: int) -> int:
        """A stopped child that will do `work`: its pid."""
        return self._ask({"work": work, "folder": str(folder), **job})["pid"]

    def wait(self, pid: int) -> Ended:
        return Ended(**self._ask({"wait": pid}))

    def run(self, work: str, folder: Path, **job: int) -> Ended:
        return self.race(work, folder, 1, **job)[0]

    def race(self, work: str, folder: Path, num_processes: int, **job: int) -> list[Ended]:
        """The same work in several processes at once."""
        pids = [self.start(work, folder, **job) for _ in range(num_processes)]
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        return [self.wait(pid) for pid in pids]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def _ask(self, question: dict) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())
