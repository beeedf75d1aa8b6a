"""Submitting a run to Slurm: what is missing and not yet queued goes out as a chain of jobs. Run again, it heals."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, OpdCacheError
from opd_cache.health.stage import check_episode
from opd_cache.launch import slurm
from opd_cache.launch.chain import Step, now_waiting_wrongly, plan_steps
from opd_cache.launch.clusters import LoadedCluster
from opd_cache.launch.scripts import Script, is_array, render_scripts, write_scripts
from opd_cache.launch.work import Key, Work, unfinished_work
from opd_cache.recipes import recipe_yaml
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import append_line, replace_file

DEFAULT_MAX_ARRAY_SIZE = 1001


@dataclass(frozen=True)
class Submission:
    """What is to be done about a run, before anything is."""

    run: RunDir
    recipe: Recipe
    scripts: list[Script]
    steps: list[Step]
    queue_fault: str | None = None  # why a dry run takes the queue for empty

    @property
    def label(self) -> str:
        return slurm.job_label(self.run.path)

    def script(self, stage: str) -> Script:
        return next(script for script in self.scripts if script.stage == stage)

    def arguments(self, step: Step, upstream: Sequence[str]) -> list[str]:
        """Of sbatch, for the array indices that a step sends."""
        stage, number = step.work.key
        options = [f"--job-name={slurm.job_name(self.label, stage, number, step.width)}", "--kill-on-invalid-dep=yes"]
        if is_array(stage):
            options.append(f"--array={slurm.array_text(step.send)}{step.throttle}")
        if upstream:
            options.append(f"--dependency={slurm.after(upstream)}")
        return [*options, str(self.script(stage).path), str(number), str(step.width)]


def plan_submission(
    recipe: Recipe, run: RunDir, cluster: LoadedCluster, episodes: Sequence[int] | None = None, is_dry: bool = False
) -> Submission:
    """What a run lacks and what the queue does not hold of it yet.

    run: absolute. Raises ConfigError; TryAgainError when Slurm's controller does not answer; UnhealthyError when what is
    there already would stop the run.
    """
    scripts = render_scripts(run, Path.cwd(), sys.executable, cluster)
    try:
        queue, max_array_size = slurm.settled_tasks(slurm.job_label(run.path)), slurm.max_array_size()
        fault = None
    except OpdCacheError as error:
        if not is_dry:
            raise
        queue, max_array_size, fault = [], DEFAULT_MAX_ARRAY_SIZE, str(error)
    works = unfinished_work(recipe, run)
    for episode in sorted(
        {max(0, episode) for work in works if not work.is_done for episode in _episodes_before(work)}
    ):
        check_episode(run, recipe, episode, keep=not is_dry)
    steps = plan_steps(works, queue, cluster.jobs, max_array_size)
    return Submission(run, recipe, scripts, _chosen(steps, episodes), fault)


def _episodes_before(work: Work) -> tuple[int, int]:
    """Those that a piece of work goes on from: its own, and the one before."""
    return work.number - 1, work.number


def _chosen(steps: list[Step], episodes: Sequence[int] | None) -> list[Step]:
    """The same, sending only what belongs to some episodes. Raises ConfigError where they need what is neither done nor
    queued."""
    if episodes is None:
        return steps
    chosen = [step if _episode_of(step.work) in episodes else replace(step, send=()) for step in steps]
    coming = {step.work.key for step in chosen if step.send or step.queued}
    for step in chosen:
        if step.send and (absent := next((key for key in step.work.after if key not in coming), None)):
            raise ConfigError(
                f"{step.work.stage} {step.work.number} needs {absent[0]} {absent[1]}, which is neither done nor queued. Submit from episode {absent[1]} on."
            )
    return chosen


def _episode_of(work: Work) -> int:
    return max(0, work.number - 1) if work.stage == "eval" else work.number


def submit(plan: Submission, tell: Callable[[str], None]) -> dict[Key, list[str]]:
    """Send what is missing; returns the ids of the queued jobs by stage and number.

    tell: gets a line on everything that was done besides. Raises ConfigError when sbatch refuses a job before any was
    sent, TryAgainError when a limit stops the chain: what was sent stays, and the next submission goes on.
    """
    write_scripts(plan.scripts)
    plan.run.job_logs.mkdir(parents=True, exist_ok=True)  # Slurm fails a job whose log has no folder, in silence
    replace_file(plan.run.submitted_recipe, recipe_yaml(plan.recipe))
    for script in plan.scripts:
        if script.is_edited:
            tell(f"{script.path}: edited by hand, kept; delete it to have it written anew.")
    first_of_stage = {step.work.stage: step for step in reversed(plan.steps) if step.send}
    for step in first_of_stage.values():
        slurm.check_sendable(plan.arguments(step, ()), f"{step.work.stage} job: ")
    if dead := [job for step in plan.steps for row in step.dead for job in row.ids]:
        slurm.take_back(dead)
        tell(f"cancelled {', '.join(dead)}, which could never have run.")
    ids = {step.work.key: list(dict.fromkeys(row.job_id for row in step.queued)) for step in plan.steps}
    for step in plan.steps:
        _send(plan, step, ids, tell)
    return ids


def _send(plan: Submission, step: Step, ids: dict[Key, list[str]], tell: Callable[[str], None]) -> None:
    upstream = [job for key in step.work.after for job in ids.get(key, [])]
    known = {job for jobs in ids.values() for job in jobs}
    for job in dict.fromkeys(now_waiting_wrongly(step, upstream, known)):
        slurm.wait_for_others(job, upstream)
        tell(f"job {job} ({step.work.stage} {step.work.number}) now waits for {', '.join(upstream) or 'nothing'}.")
    if step.send:
        stage, number = step.work.key
        job = slurm.send(plan.arguments(step, upstream), f"{stage} {number}: ")
        ids[step.work.key].append(job)
        tasks = slurm.array_text(step.send)
        note = {"job": job, "stage": stage, "number": number, "width": step.width, "tasks": tasks, "after": upstream}
        append_line(plan.run.submitted_jobs, json.dumps({**note, "time": int(time.time())}))


def cancel(run: RunDir) -> list[str]:
    """Take back all jobs of a run; their ids. What is published stays."""
    jobs = list(dict.fromkeys(row.job_id for row in slurm.queued_tasks(slurm.job_label(run.path))))
    slurm.take_back(jobs)
    return jobs


def submission_rows(plan: Submission, ids: dict[Key, list[str]]) -> list[dict[str, Any]]:
    """What was found and sent, one row a stage and episode, for programs and tables."""
    return [
        {
            "stage": step.work.stage,
            "number": step.work.number,
            "shards": step.work.num_shards,
            "missing": len(step.work.missing),
            "sent_tasks": slurm.array_text(step.send),
            "width": step.width,
            "queued_tasks": slurm.array_text([task for row in step.queued for task in row.tasks]),
            "jobs": ids.get(step.work.key, []),
            "after": [f"{stage} {number}" for stage, number in step.work.after],
        }
        for step in plan.steps
        if step.send or step.queued
    ]
