"""A learn job of two ranks on a real Slurm that loses a rank, is warned of its time limit, and goes on."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import data_files
from slurm_cluster import Slurm
from submitted import Submitted

CLUSTER = """
defaults: {cpus_per_task: 1, mem: 800M, setup: [export OMP_NUM_THREADS=1]}
max_requeues: 2
warning_s: 20
"""
SETTINGS = (
    "num_episodes=1", "eval.path=null", "rollout.sampler=random_sampler:RandomSampler", "learn.num_ranks=2",
    "learn.epochs_per_episode=20", "learn.checkpoint_every_steps=1",
)  # fmt: skip


def ranks_of(job: str) -> Iterator[tuple[int, int]]:
    """(rank, pid) of the processes that a job's step has started on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        rank = next((line[13:] for line in environment if line.startswith(b"SLURM_PROCID=")), None)
        is_of_step = any(line.startswith(b"SLURM_STEP_ID=") for line in environment)
        if f"SLURM_JOB_ID={job}".encode() in environment and is_of_step and rank and b"opd_cache\0learn" in command:
            yield int(rank), int(folder.name)


def wait_until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "engine"),
    [pytest.param(2, 1, "torch", id="two_nodes"), pytest.param(1, 2, "deepspeed", id="one_node_deepspeed")],
)
def test_a_step_that_loses_a_rank_and_is_warned_goes_on_from_its_checkpoints(
    slurm: Slurm, task: Path, tmp_path: Path, same_run_here: Callable[..., Path],
    nodes: int, ranks_per_node: int, engine: str,
) -> None:  # fmt: skip
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    settings = (*SETTINGS, f"learn.engine={engine}")
    layout = (f"cluster.learn.nodes={nodes}", f"cluster.learn.ranks_per_node={ranks_per_node}")
    run = Submitted(slurm, task / "recipe.yaml", tmp_path / "cluster.yaml", tmp_path / "run", (*settings, *layout))
    job = next(row["jobs"][0] for row in run.submit() if row["stage"] == "learn")
    log = run.run / f"logs/slurm/learn-{job}.log"

    def last_checkpoint() -> str:
        return max((path.name for path in run.run.glob("episode=0/learn/checkpoint-??????")), default="")

    wait_until(lambda: last_checkpoint() > "")
    os.kill(dict(ranks_of(job))[1], signal.SIGKILL)
    wait_until(lambda: "queued again, after 0 of at most 2 times" in log.read_text())
    before = last_checkpoint()
    wait_until(lambda: last_checkpoint() > before)
    slurm("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: "queued again, after 1 of at most 2 times" in log.read_text())
    run.wait()
    assert run.status() == [], log.read_text()
    assert data_files(run.run) == data_files(same_run_here(*settings))
