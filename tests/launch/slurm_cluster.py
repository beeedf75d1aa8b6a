"""Commands against a real Slurm of two nodes on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
SANDBOX = TESTS.parent / "tools/slurm/sandbox.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATH_OF_DAEMONS = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Slurm:
    """A sandbox cluster: its folder, and commands run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{PATH_OF_DAEMONS}",
            # Jobs use rewards and samplers of the tests' own.
            "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}",
        }

    def __call__(self, *command: str | Path) -> str:
        """A client command's output; its errors are shown where it fails."""
        ended = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def attempt(self, *command: str | Path) -> None:
        """A command that may come too late."""
        subprocess.run([str(part) for part in command], env=self.environment, capture_output=True, timeout=60)

    def sandbox(self, verb: str, *arguments: str) -> None:
        subprocess.run([str(SANDBOX), verb, str(self.folder), *arguments], check=True, timeout=60)

    def submit(self, script: Path, *options: str, script_arguments: Sequence[str] = ()) -> str:
        """The id of a new job."""
        return self("sbatch", "--parsable", "--propagate=NONE", *options, script, *script_arguments).strip()

    def states(self, job: str) -> list[str]:
        """Slurm's states of a job's tasks, those long ended left out."""
        listed = self("scontrol", "-o", "show", "job", job)
        return [field.removeprefix("JobState=") for field in listed.split() if field.startswith("JobState=")]

    def wait(self, job: str, timeout_s: float = 120) -> list[str]:
        """The states of a job's tasks when none is waiting or running any more."""
        deadline = time.monotonic() + timeout_s
        while {*(states := self.states(job))} & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}:
            assert time.monotonic() < deadline, f"job {job} is still {states}"
            time.sleep(0.2)
        return states


def batch_script(path: Path, lines: Sequence[str]) -> Path:
    """A plain batch script, as a user writes it."""
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return path
