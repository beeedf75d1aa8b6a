"""Whole runs as chains of Slurm jobs, on a real Slurm."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import data_files
from slurm_cluster import Slurm

from opd_cache.config import Recipe

CLUSTER = """
defaults:
  cpus_per_task: 1
  mem: 400M
  setup: [export OMP_NUM_THREADS=1]
rollout: {num_tasks: 4, partition: cpu}
score: {num_tasks: 4, partition: gpu, gres: "gpu:1"}
learn: {nodes: 2}
max_requeues: 5
warning_s: 20
"""
SETTINGS = ("num_episodes=3", "rollout.prompts_per_shard=3", "learn.num_ranks=2", "learn.checkpoint_every_steps=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "two_nodes.yaml"
    path.write_text(CLUSTER)
    return path


@pytest.fixture(scope="module")
def undisturbed(make_recipe: Callable[..., Recipe], task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine, by `opd-cache run`."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [shutil.which("opd-cache") or "opd-cache", "run", f"{task}/recipe.yaml", f"run_dir={folder}", *SETTINGS]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


class Submitted:
    """A run that is submitted to a cluster, and the commands of a user who looks after it."""

    def __init__(self, slurm: Slurm, recipe: Path, cluster: Path, run: Path, settings: tuple[str, ...]) -> None:
        self.slurm, self.run = slurm, run
        self.arguments = (str(recipe), str(cluster), f"run_dir={run}", *settings)

    def command(self, *arguments: str, status: int = 0) -> str:
        """Run `opd-cache ...`; its output, or its error where another status is expected."""
        ended = subprocess.run(
            ["opd-cache", *arguments], env=self.slurm.environment, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == status, ended.stderr + ended.stdout
        return ended.stderr if status else ended.stdout

    def submit(self, *options: str) -> list[dict[str, Any]]:
        """What was found and sent, by stage and episode."""
        return json.loads(self.command("submit", *self.arguments, "--json", *options))["stages"]

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


@pytest.fixture
def new_run(slurm: Slurm, task: Path, cluster: Path, tmp_path: Path) -> Callable[..., Submitted]:
    def make(*settings: str) -> Submitted:
        return Submitted(slurm, task / "recipe.yaml", cluster, tmp_path / "run", settings or SETTINGS)

    return make


def test_a_submitted_run_is_the_run_of_one_machine(new_run: Callable[..., Submitted], undisturbed: Path) -> None:
    """Arrays of four tasks for rollouts and scores, two ranks on two nodes, three episodes."""
    run = new_run()
    sent = run.submit()
    assert [(row["stage"], row["number"], row["sent_tasks"]) for row in sent if row["number"] == 0] == [
        ("eval", 0, "0"), ("rollout", 0, "0-3"), ("score", 0, "0-3"), ("learn", 0, "0"),
    ]  # fmt: skip
    assert all(not row["sent_tasks"] for row in run.submit()), "all is queued"
    run.wait()
    assert run.status() == []
    assert data_files(run.run) == data_files(undisturbed)
    assert run.submit() == []
