"""A run that is submitted to a real Slurm, and the commands of a user who looks after it."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from slurm_cluster import Slurm


class Submitted:
    """A run that is submitted to a cluster, and the commands of a user who looks after it."""

    def __init__(self, slurm: Slurm, recipe: Path, cluster: Path, run: Path, settings: tuple[str, ...]) -> None:
        self.slurm, self.run = slurm, run
        self.arguments = (str(recipe), str(cluster), f"run_dir={run}", *settings)

    def command(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run `opd-cache ...`; its output, or its error where another status is expected."""
        ended = subprocess.run(
            ["opd-cache", *arguments],
            env=self.slurm.environment | {"COLUMNS": "200"} | environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ended.returncode == status, ended.stderr + ended.stdout
        return ended.stderr if status else ended.stdout

    def submit(self, *options: str, **environment: str) -> list[dict[str, Any]]:
        """What was found and sent, by stage and episode."""
        return json.loads(self.command("submit", *self.arguments, "--json", *options, **environment))["stages"]

    def sent(self, *options: str, **environment: str) -> dict[str, str]:
        """The array indices that were sent, by stage and episode."""
        rows = self.submit(*options, **environment)
        return {f"{row['stage']} {row['number']}": row["sent_tasks"] for row in rows if row["sent_tasks"]}

    def status(self) -> list[dict[str, Any]]:
        """The stages that are not done."""
        return json.loads(self.command("status", str(self.run), "--json"))["slurm"]["stages"]

    def queue(self) -> list[str]:
        return self.slurm("squeue", "-h", "-o", "%j|%K|%T|%r").splitlines()

    def wait(self, timeout_s: float = 300) -> None:
        """Until no job is left."""
        deadline = time.monotonic() + timeout_s
        while (queue := self.queue()) and time.monotonic() < deadline:
            time.sleep(0.3)
        assert queue == []

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Until a line of the queue holds this."""
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.queue()):
            assert time.monotonic() < deadline, self.queue()
            time.sleep(0.05)
