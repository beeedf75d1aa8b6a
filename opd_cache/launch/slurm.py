"""Slurm's own commands: what is queued, sending a job, taking one back. No accounting is needed.

A job of a run is known by its name, RUN.STAGE.NUMBER.WIDTH: ids are forgotten, and given anew after a crash.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_cache.errors import ConfigError, TryAgainError

LARGEST_ARRAY = 4_000_001  # Slurm's own limit
# Fields of one line of squeue: array's id, its indices, state, reason, dependency, name.
FIELDS = "%F|%K|%T|%r|%E|%j"
SETTLING_S = 15.0
# What squeue says of a job that Slurm will never start by itself.
DEAD_REASONS = ("DependencyNeverSatisfied", "launch failed requeued held")
# sbatch says these when a later submission may work.
BUSY = re.compile(r"limit|try again|temporarily|Socket timed out|Unable to contact|Connection refused", re.IGNORECASE)


class SlurmMissingError(ConfigError):
    """There is no Slurm here."""


@dataclass(frozen=True)
class QueuedTasks:
    """Tasks of one job that are in one state."""

    job_id: str
    stage: str
    number: int
    width: int
    tasks: frozenset[int]
    state: str
    reason: str
    dependency: str
    is_array: bool

    @property
    def ids(self) -> list[str]:
        """What scancel calls these tasks."""
        return [self.job_id] if not self.is_array else [f"{self.job_id}_{task}" for task in sorted(self.tasks)]

    @property
    def is_dead(self) -> bool:
        return self.state == "PENDING" and self.reason in DEAD_REASONS

    @property
    def waits_for(self) -> set[str]:
        """The ids of the jobs that it still waits for."""
        return set(re.findall(r"afterok:(\d+)", self.dependency))


def made_by(rows: Iterable[QueuedTasks]) -> Callable[[int], bool]:
    """Whether one of these tasks makes a shard. The queue has a row for every running task, but only few widths."""
    tasks: dict[int, set[int]] = {}
    for row in rows:
        tasks.setdefault(row.width, set()).update(row.tasks)
    return lambda shard: any(shard % width in mine for width, mine in tasks.items())


def job_label(run_path: Path) -> str:
    """The first part of the names of a run's jobs: for people its folder, and for programs which folder of that name."""
    path = run_path.resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', path.name)[:40]}-{digest}"


def job_name(label: str, stage: str, number: int, width: int) -> str:
    return f"{label}.{stage}.{number}.{width}"


def queued_tasks(label: str) -> list[QueuedTasks]:
    """What the queue holds of a run, ended jobs left out. Raises SlurmMissingError, TryAgainError."""
    lines = _run("squeue", "--noheader", f"--user={os.getuid()}", f"--format={FIELDS}").splitlines()
    rows = (_queued(line) for line in lines if f"|{label}." in line)
    return [row for name, row in rows if name == label]


def settled_tasks(label: str) -> list[QueuedTasks]:
    """The same once nothing is between two states: a task that is ending may have failed, or be queued again."""
    deadline = time.monotonic() + SETTLING_S
    rows = queued_tasks(label)
    while any(row.state == "COMPLETING" for row in rows) and time.monotonic() < deadline:
        time.sleep(0.5)
        rows = queued_tasks(label)
    return [row for row in rows if row.state != "COMPLETING"]


def _queued(line: str) -> tuple[str, QueuedTasks]:
    job_id, indices, state, reason, dependency, name = line.split("|", 5)
    label, stage, number, width = name.rsplit(".", 3)
    tasks = frozenset(array_indices(indices))
    return label, QueuedTasks(
        job_id, stage, int(number), int(width), tasks, state, reason, dependency, indices != "N/A"
    )


def array_indices(text: str) -> list[int]:
    """The indices of `3,5-7%2`, as Slurm writes them; 0 for a job that is no array."""
    if text == "N/A":
        return [0]
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        indices = range(int(first), int(last or first) + 1)
        if indices.stop > LARGEST_ARRAY:
            raise ValueError(f"array indices up to {indices.stop - 1}")
        found += indices
    return found


def array_text(indices: Sequence[int]) -> str:
    """The shortest way to write them: `3,5-7`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def max_array_size() -> int:
    """Slurm's MaxArraySize: array indices are below it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else 1001


def send(arguments: Sequence[str], about: str) -> str:
    """sbatch; the new job's id. Raises TryAgainError where a limit or a busy controller refused it, else ConfigError."""
    return _run("sbatch", "--parsable", *arguments, about=about).strip().partition(";")[0]


def check_sendable(arguments: Sequence[str], about: str) -> None:
    """Ask whether Slurm would take a job, sending none. Raises ConfigError."""
    _run("sbatch", "--test-only", *arguments, about=about)


def take_back(job_ids: Sequence[str]) -> None:
    """scancel; jobs that have ended meanwhile are no error."""
    if job_ids:
        _run("scancel", *job_ids, is_checked=False)


def wait_for_others(job_id: str, upstream: Sequence[str]) -> None:
    """Make a waiting job wait for these. One that has begun meanwhile finds out by itself what is missing."""
    _run("scontrol", "update", f"jobid={job_id}", f"dependency={after(upstream)}", is_checked=False)


def after(job_ids: Sequence[str]) -> str:
    return "afterok:" + ":".join(job_ids)


def _run(program: str, *arguments: str, about: str = "", is_checked: bool = True) -> str:
    if shutil.which(program) is None:
        raise SlurmMissingError(
            f"there is no {program} here: submit where Slurm's commands are, or run everything on this machine: opd-cache run RECIPE"
        )
    # Without it squeue shortens long lists of array indices.
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}
    ended = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    if is_checked and ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        reason = f"{about}{program}: {re.sub(rf'^{program}: (error: |fatal: )?', '', lines[-1])}"
        raise (TryAgainError if BUSY.search(ended.stderr) else ConfigError)(reason)
    return ended.stdout
