"""The tests' side of warm_server.py: commands that start at once, so that hundreds of faults can be tried on them."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import Ended


@dataclass
class Started:
    """A command that runs."""

    server: "WarmCommands"
    pid: int
    folder: Path
    status: int | None = None

    def wait(self) -> Ended:
        """Its end. One that has stopped itself must be continued first."""
        if self.status is None:
            self.status = self.server.ask({"wait": self.pid})["status"]
        return Ended(self.status, (self.folder / "stderr").read_text())

    def halts(self) -> bool:
        """Wait until it stops itself; False when it has ended instead."""
        self.status = self.server.ask({"halt": self.pid})["status"]
        return self.status is None

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()


class WarmCommands:
    """One warm_server.py and its children."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.numbers = folder, itertools.count()
        script = str(Path(__file__).with_name("warm_server.py"))
        pipe = subprocess.PIPE
        variables = {**os.environ, **environment}
        self.process = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=variables)

    def start(self, *arguments: object, **job: Any) -> Started:
        """Begin `opd-cache ARGUMENTS`; `job` is what warm_server.py says."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        folder.chmod(0o777)
        content = {"arguments": list(map(str, arguments)), "folder": str(folder), **job}
        return Started(self, self.ask(content)["pid"], folder)

    def run(self, *arguments: object, **job: Any) -> Ended:
        return self.start(*arguments, **job).wait()

    def race(self, commands: Sequence[Sequence[object]], **job: Any) -> list[Ended]:
        """All of them at once."""
        started = [self.start(*arguments, **job) for arguments in commands]
        return [one.wait() for one in started]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
