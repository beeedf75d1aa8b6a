"""Cluster files: what Slurm is asked for, stage by stage. Read by launch/clusters.py."""

from dataclasses import dataclass
from typing import Optional

from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class JobOptions:
    """The jobs of one stage. What is left out is left to Slurm's own defaults."""

    partition: Optional[str] = option(None, "Where the jobs run: --partition.")
    account: Optional[str] = option(None, "Who pays: --account.")
    qos: Optional[str] = option(None, "--qos.")
    constraint: Optional[str] = option(None, "Features of a node, such as a100|h100: --constraint.")
    gres: Optional[str] = option(None, "GPUs and the like of a node, such as gpu:4: --gres.")
    cpus_per_task: Optional[int] = option(None, "CPUs of an array task, or of a rank of learn.", min=1)
    mem: Optional[str] = option(None, "Memory of a node, such as 64G: --mem.")
    time: Optional[str] = option(None, "Time limit, such as 04:00:00 (in quotes): --time.")
    num_tasks: int = option(
        1,
        "rollout, score: width of the array. A task loads its model once and makes every num_tasks-th missing shard. More tasks than shards are not sent.",
        min=1,
    )
    max_running: Optional[int] = option(None, "Tasks of an array that run at once; null: all that Slurm starts.", min=1)
    nodes: int = option(1, "learn: nodes of the job.", min=1)
    ranks_per_node: int = option(1, "learn: processes on each node, started by srun.", min=1)
    setup: Optional[list[str]] = option(
        None, "Shell lines before the stage, such as 'module load cuda' or '. /opt/venv/bin/activate'."
    )
    command: Optional[str] = option(
        None,
        "How opd-cache is called there, such as opd-cache, or apptainer exec --nv image.sif opd-cache; null: by the Python that submits.",
    )
    sbatch: Optional[list[str]] = option(None, "Further sbatch options, such as --exclusive or --reservation=night.")


@dataclass
class Cluster:
    """A Slurm cluster. `defaults` hold for every stage that does not say otherwise."""

    defaults: JobOptions = option(JobOptions, "For all stages.")
    rollout: JobOptions = option(JobOptions, "The rollout array.")
    score: JobOptions = option(JobOptions, "The score array.")
    learn: JobOptions = option(JobOptions, "The learn job.")
    eval: JobOptions = option(JobOptions, "The evaluation job.")
    max_requeues: int = option(
        3,
        "Starts after the first, for a stage that stops with exit status 75 (signals, full disks, a teacher that is away) or loses a process to a signal (memory); preemptions and lost nodes count, too. 0: a person submits again.",
        min=0,
    )
    warning_s: int = option(
        120,
        "Seconds before a time limit or a preemption at which a stage is told to stop. Longer than a step of learn and its checkpoint take.",
        min=1,
        max=65_535,
    )
    template: Optional[str] = option(
        None, "A batch script of your own in place of the packaged one (opd_cache/launch/job.sh)."
    )
