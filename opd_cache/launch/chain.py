"""What to submit: the work that is missing, less what the queue already holds. Pure; submit.py acts on it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opd_cache.config.cluster import JobOptions
from opd_cache.launch.slurm import QueuedTasks, made_by
from opd_cache.launch.work import Key, Work


@dataclass(frozen=True)
class Step:
    """What one stage of one episode needs: array indices to send, in an array of `width`, beside what is queued."""

    work: Work
    width: int
    max_running: int | None
    send: tuple[int, ...]
    queued: tuple[QueuedTasks, ...] = field(default=())
    dead: tuple[QueuedTasks, ...] = field(default=())  # will never run

    @property
    def throttle(self) -> str:
        return f"%{self.max_running}" if self.max_running else ""


def plan_steps(
    works: Sequence[Work], queue: Sequence[QueuedTasks], jobs: Mapping[str, JobOptions], max_array_size: int
) -> list[Step]:
    """One step for every work that is not done, in order. jobs: by stage, of the cluster file."""
    rows: dict[Key, list[QueuedTasks]] = {}
    for row in queue:
        rows.setdefault((row.stage, row.number), []).append(row)
    return [_step(work, rows.get(work.key, []), jobs[work.stage], max_array_size) for work in works if not work.is_done]


def _step(work: Work, mine: Sequence[QueuedTasks], job: JobOptions, max_array_size: int) -> Step:
    alive = tuple(row for row in mine if not row.is_dead)
    width = min(job.num_tasks, max_array_size, work.num_shards)
    is_coming = made_by(alive)
    send = tuple(sorted({shard % width for shard in work.missing if not is_coming(shard)}))
    return Step(work, width, job.max_running, send, alive, tuple(row for row in mine if row.is_dead))


def now_waiting_wrongly(step: Step, upstream: Sequence[str], known: set[str]) -> Iterator[str]:
    """The queued jobs of a step that wait for other jobs than those that now make its inputs.

    upstream: the ids of those; known: every id that is queued.
    """
    for row in step.queued:
        if row.state == "PENDING" and row.waits_for != set(upstream) and (upstream or not row.waits_for <= known):
            yield row.job_id
