"""Whole runs on a real Slurm while nodes, daemons and jobs are killed at random: one more `submit`, and all is as ever.

CHAOS_EVENTS=20 CHAOS_SEED=1 pytest -s tests/launch/test_chaos.py
"""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import data_files, run_command
from slurm_cluster import Slurm
from submitted import Submitted

EVENTS = int(os.environ.get("CHAOS_EVENTS", "4"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
EPISODES = int(os.environ.get("CHAOS_EPISODES", "1"))
CLUSTER = """
defaults: {cpus_per_task: 1, mem: 400M, setup: [export OMP_NUM_THREADS=1], partition: low}
rollout: {num_tasks: 4}
score: {num_tasks: 4}
learn: {nodes: 2}
max_requeues: 1000
warning_s: 20
"""
SETTINGS = (
    f"num_episodes={EPISODES}", "eval.path=null", "rollout.prompts_per_shard=3",
    "learn.num_ranks=2", "learn.checkpoint_every_steps=1",
)  # fmt: skip


class Chaos:
    """Faults that a cluster meets, on nodes and jobs taken at random."""

    def __init__(self, slurm: Slurm, run: Submitted, rng: random.Random, preemptor: Path) -> None:
        self.slurm, self.run, self.rng, self.preemptor = slurm, run, rng, preemptor

    def some_node(self) -> str:
        return self.rng.choice(["n1", "n2"])

    def some_job(self) -> str | None:
        jobs = self.slurm("squeue", "-h", "-t", "RUNNING", "-o", "%i|%j").splitlines()
        jobs = [line.split("|")[0] for line in jobs if "preemptor" not in line]
        return self.rng.choice(jobs) if jobs else None

    def node_crashes(self) -> None:
        node = self.some_node()
        self.slurm.sandbox("crash-node", node)
        time.sleep(self.rng.choice([0.5, 12]))  # back before and after Slurm has noticed
        self.slurm.sandbox("up", f"slurmd-{node}")

    def controller_is_killed(self) -> None:
        self.slurm.sandbox("kill", "slurmctld")
        time.sleep(1)
        self.slurm.sandbox("up", "slurmctld")

    def controller_restarts(self) -> None:
        self.slurm.sandbox("down", "slurmctld")
        self.slurm.sandbox("up", "slurmctld")

    def daemon_of_a_node_is_killed(self) -> None:
        """Its jobs go on and, once Slurm has given the node up, run a second time elsewhere."""
        node = self.some_node()
        self.slurm.sandbox("kill", f"slurmd-{node}")
        time.sleep(13)
        self.slurm.sandbox("up", f"slurmd-{node}")

    def job_is_requeued(self) -> None:
        if job := self.some_job():
            self.slurm.attempt("scontrol", "requeue", job)

    def job_is_cancelled_and_the_run_submitted_again(self) -> None:
        if job := self.some_job():
            self.slurm.attempt("scancel", job)
        self.run.submit()

    def run_is_cancelled_and_submitted_again(self) -> None:
        self.run.command("cancel", str(self.run.run))
        self.run.submit()

    def job_is_preempted(self) -> None:
        self.slurm("sbatch", "--partition=high", "--job-name=preemptor", "--nodes=1", "--exclusive", self.preemptor)

    def strike(self) -> str:
        event = self.rng.choice(
            [
                self.node_crashes, self.controller_is_killed, self.controller_restarts, self.daemon_of_a_node_is_killed,
                self.job_is_requeued, self.job_is_cancelled_and_the_run_submitted_again,
                self.run_is_cancelled_and_submitted_again, self.job_is_preempted,
            ]
        )  # fmt: skip
        event()
        return event.__name__


@pytest.mark.slow
def test_a_run_under_chaos_ends_with_the_files_of_an_undisturbed_one(
    slurm: Slurm, task: Path, tmp_path: Path, same_run_here: Callable[..., Path]
) -> None:
    expected = data_files(same_run_here(*SETTINGS))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(CLUSTER)
    preemptor = tmp_path / "preemptor.sh"
    preemptor.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nsleep 3\n")
    rng = random.Random(SEED)
    run = Submitted(slurm, task / "recipe.yaml", cluster, tmp_path / "run", SETTINGS)
    chaos = Chaos(slurm, run, rng, preemptor)
    run.submit()
    done: list[str] = []
    while len(done) < EVENTS:
        time.sleep(rng.uniform(0.5, 6))
        done.append(chaos.strike())
        print(f"{time.strftime('%T')} {done[-1]} ({len(run.status())} stages left)", flush=True)
        if not run.queue():
            run.submit()
    run.wait(600)
    run.submit()
    run.wait(600)
    assert run.status() == []
    found = data_files(run.run)
    assert {name for name in expected if found.get(name) != expected[name]} == set()
    assert found.keys() == expected.keys()
    run.command("gc", str(run.run), "--older-than", "0")
    assert list(run.run.rglob("*.tmp")) == []
    rows = json.loads(
        run_command(
            "query", str(run.run), "select count(*) as n, count(distinct rollout_id) as ids from rollouts", "--json"
        ).stdout
    )
    assert rows["n"] == rows["ids"] == EPISODES * 24
