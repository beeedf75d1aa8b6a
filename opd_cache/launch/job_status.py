"""Where the jobs of a submitted run stand: the files say what is done, squeue what is coming, and logs what went wrong."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from opd_cache.errors import CorruptShardError, OpdCacheError
from opd_cache.launch import slurm
from opd_cache.launch.scripts import NUMBERED, is_array
from opd_cache.launch.slurm import QueuedTasks
from opd_cache.launch.work import Key, Work, unfinished_work
from opd_cache.recipes import load_recipe
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import read_plain_json

TAIL_BYTES = 4096


def job_status(path: Path) -> dict[str, Any]:
    """Every stage of a submitted run that is not done.

    `queue` says why the queue could not be asked; then nothing is known of what runs.
    """
    run = RunDir(path.resolve())
    works = [work for work in unfinished_work(load_recipe([str(run.submitted_recipe)]), run) if not work.is_done]
    queue, reason = _queue(run)
    sent = _sent_jobs(run)
    rows: dict[Key, list[QueuedTasks]] = {}
    for row in queue:
        rows.setdefault((row.stage, row.number), []).append(row)
    return {
        "queue": reason,
        "stages": [_stage(run, work, rows.get(work.key, []), sent.get(work.key, [])) for work in works],
    }


def _queue(run: RunDir) -> tuple[list[QueuedTasks], str | None]:
    try:
        return slurm.queued_tasks(slurm.job_label(run.path)), None
    except OpdCacheError as error:
        return [], str(error)


def _sent_jobs(run: RunDir) -> dict[Key, list[dict[str, Any]]]:
    jobs: dict[Key, list[dict[str, Any]]] = {}
    lines = run.submitted_jobs.read_text(errors="replace").splitlines() if run.submitted_jobs.exists() else []
    for number, line in enumerate(lines, 1):
        if (job := _job(line)) is None:
            raise CorruptShardError(f"{run.submitted_jobs}:{number}: no note of a job; remove the line.")
        jobs.setdefault((job["stage"], job["number"]), []).append(job)
    return jobs


def _job(line: str) -> dict[str, Any] | None:
    """What submit wrote down of a job; None for a line that a full disk or somebody else has left."""
    try:
        job = json.loads(line)
        slurm.array_indices(job["tasks"])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    has_numbers = all(type(job.get(key)) is int and job[key] >= 0 for key in ("number", "width"))
    # Its id becomes part of a log's name.
    is_note = has_numbers and job["width"] > 0 and job.get("stage") in NUMBERED and str(job.get("job")).isdecimal()
    return job if is_note else None


def _stage(run: RunDir, work: Work, queue: Sequence[QueuedTasks], sent: Sequence[dict[str, Any]]) -> dict[str, Any]:
    running = sum(len(row.tasks) for row in queue if row.state == "RUNNING")
    waiting = sum(len(row.tasks) for row in queue if row.state == "PENDING" and not row.is_dead)
    is_coming = slurm.made_by(row for row in queue if not row.is_dead)
    lost = [shard for shard in work.missing if not is_coming(shard)]
    return {
        "stage": work.stage,
        "number": work.number,
        "shards": work.num_shards,
        "done": work.num_shards - len(work.missing),
        "running": running,
        "waiting": waiting,
        "reason": next((row.reason for row in queue if row.state == "PENDING"), None),
        "not_queued": len(lost),
        "jobs": list(dict.fromkeys(row.job_id for row in queue)),
        "ended": list(_ended(run, work, lost, sent)),
        "seconds_left": _seconds_left(run, work, running),
    }


def _ended(run: RunDir, work: Work, lost: list[int], sent: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tasks that ended without all of their shards: which those are, and their last log line."""
    left = set(lost)
    for job in reversed(sent):
        by_task: dict[int, list[int]] = {}
        for shard in sorted(left):
            by_task.setdefault(shard % job["width"], []).append(shard)
        for task in slurm.array_indices(job["tasks"]):
            shards = by_task.get(task, [])
            log = run.job_log(work.stage, f"{job['job']}_{task}" if is_array(work.stage) else job["job"])
            if shards and log.exists():
                left -= set(shards)
                yield {"job": job["job"], "task": task, "shards": shards, "log": str(log), "line": last_line(log)}


def last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _seconds_left(run: RunDir, work: Work, running: int) -> float | None:
    """At the pace of the shards of this stage that are done; None before the first."""
    if not running or not is_array(work.stage):
        return None
    notes = run.log_folder(work.stage, run.episode(work.number).log_name).glob("*-shard-*[0-9].json")
    seconds = [read_plain_json(path)["seconds"] for path in notes]
    return fmean(seconds) * len(work.missing) / running if seconds else None


def job_table(found: dict[str, Any]) -> Any:
    """The same for people: a rich table."""
    from rich.table import Table

    table = Table(title="Slurm" if found["queue"] is None else f"Slurm: {found['queue']}")
    for column in ("stage", "", "shards", "running", "waiting", "left", "remarks"):
        table.add_column(column, justify="left" if column in ("stage", "remarks") else "right", overflow="fold")
    for row in found["stages"]:
        left = "" if row["seconds_left"] is None else f"{row['seconds_left'] / 60:.0f} min"
        shards = f"{row['done']}/{row['shards']}"
        numbers = (str(row["number"]), shards, str(row["running"]), str(row["waiting"]), left)
        table.add_row(row["stage"], *numbers, "\n".join(_remarks(row)))
    return table


def _remarks(row: dict[str, Any]) -> Iterator[str]:
    for ended in row["ended"]:
        shards = slurm.array_text(ended["shards"])
        yield f"job {ended['job']}_{ended['task']} ended without shard {shards}: {ended['line']}"
    if row["not_queued"] > sum(len(ended["shards"]) for ended in row["ended"]):
        yield "not queued"
    elif row["reason"] not in (None, "None", "Dependency", "Priority", "Resources"):
        yield row["reason"]
