"""Whole runs as chains of Slurm jobs, on a real Slurm."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import complete, data_files
from slurm_cluster import Slurm
from submitted import Submitted

from opd_cache.recipes import load_recipe
from opd_cache.run_dir import RunDir
from opd_cache.store.plans import load_rollout_plan

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
SETTINGS = ("eval.every_episodes=2", "rollout.prompts_per_shard=3", "learn.num_ranks=2")
REWARD = "rollout.reward=own_rewards:told_to_fail"
SMALL = (
    "num_episodes=1",
    "eval.path=null",
    "rollout.prompts_per_shard=3",
    "rollout.sampler=random_sampler:RandomSampler",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "two_nodes.yaml"
    path.write_text(CLUSTER)
    return path


@pytest.fixture(scope="module")
def unpoisoned(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One episode with a reward, on this machine."""
    folder = tmp_path_factory.mktemp("unpoisoned") / "run"
    complete(load_recipe([str(task / "recipe.yaml"), f"run_dir={folder}", *SMALL, REWARD]))
    return folder


@pytest.fixture
def new_run(slurm: Slurm, task: Path, cluster: Path, tmp_path: Path) -> Callable[..., Submitted]:
    def make(*settings: str) -> Submitted:
        return Submitted(slurm, task / "recipe.yaml", cluster, tmp_path / "run", settings or SETTINGS)

    return make


def test_a_submitted_run_is_the_run_of_one_machine(
    new_run: Callable[..., Submitted], same_run_here: Callable[..., Path]
) -> None:
    """Arrays of four tasks for rollouts and scores, two ranks on two nodes, two episodes."""
    run = new_run()
    sent = run.submit()
    assert [(row["stage"], row["number"], row["sent_tasks"]) for row in sent if row["number"] == 0] == [
        ("eval", 0, "0"), ("rollout", 0, "0-3"), ("score", 0, "0-3"), ("learn", 0, "0"),
    ]  # fmt: skip
    assert all(not row["sent_tasks"] for row in run.submit()), "all is queued"
    run.wait()
    assert run.status() == []
    assert data_files(run.run) == data_files(same_run_here(*SETTINGS))
    assert run.submit() == []


def prompts_of(run: Path, shard: int) -> list[int]:
    return load_rollout_plan(RunDir(run).episode(0)).shard_prompts(shard)


def test_a_poisoned_prompt_stops_what_follows_is_named_and_alone_sent_again(
    new_run: Callable[..., Submitted], unpoisoned: Path
) -> None:
    run = new_run(*SMALL, REWARD, "cluster.learn.nodes=1")
    poison = f"p{prompts_of(unpoisoned, 2)[0]}"
    assert run.sent(RAISES=poison) == {"rollout 0": "0-3", "score 0": "0-3", "learn 0": "0"}
    run.wait()
    rollout, score, learn = run.status()
    assert (rollout["done"], rollout["shards"], rollout["not_queued"]) == (3, 4, 1)
    (ended,) = rollout["ended"]
    assert (ended["task"], ended["shards"]) == (2, [2])
    assert (score["done"], learn["done"], score["ended"], learn["ended"]) == (0, 0, [], [])
    shown = run.command("status", str(run.run))
    assert "ended without shard 2" in " ".join(shown.split())
    assert f"boom at {poison}" in " ".join(shown.split())
    assert run.sent() == {"rollout 0": "2", "score 0": "0-3", "learn 0": "0"}
    run.wait()
    assert run.status() == []
    assert data_files(run.run) == data_files(unpoisoned)


def test_a_stop_by_health_ends_the_chain_once_and_for_all(new_run: Callable[..., Submitted]) -> None:
    stops = ("health.truncated_share=0", "health.fail_on=[truncated_share]")
    run = new_run(*SMALL, *stops, "rollout.stop_token_ids=[1]", "cluster.learn.nodes=1")
    assert run.sent() == {"rollout 0": "0-3", "score 0": "0-3", "learn 0": "0"}
    run.wait()
    assert [row["stage"] for row in run.status()] == ["score", "learn"]
    (sealing,) = [log for log in RunDir(run.run).job_logs.iterdir() if "UnhealthyError" in log.read_text()]
    assert sealing.read_text().count("ended with status 3") == 1
    assert "queued again" not in sealing.read_text()
    assert "truncated_share = " in run.command("status", str(run.run))
    assert "UnhealthyError: episode 0 rollout: truncated_share" in run.command("submit", *run.arguments, status=3)
    run.arguments = (*run.arguments, "health.fail_on=null")
    assert run.sent() == {"score 0": "0-3", "learn 0": "0"}
    run.wait()
    assert run.status() == []


def test_a_cancelled_run_stays_cancelled_until_it_is_submitted_again(
    new_run: Callable[..., Submitted], unpoisoned: Path
) -> None:
    run = new_run(*SMALL, REWARD, "cluster.learn.nodes=1")
    run.submit()
    run.wait_for("|RUNNING|")
    assert run.command("cancel", str(run.run)).startswith("cancelled ")
    run.wait(30)
    time.sleep(7)  # a requeued job would be back: its credential expires after 5 s
    assert run.queue() == []
    assert "no job is queued" in run.command("cancel", str(run.run))
    assert not (run.run / "episode=0/policy").exists()
    run.submit()
    run.wait()
    assert data_files(run.run) == data_files(unpoisoned)


def test_a_stage_whose_upstream_was_forgotten_does_not_run_on_missing_input(new_run: Callable[..., Submitted]) -> None:
    """Slurm takes a job that it no longer knows for one that has succeeded."""
    run = new_run(*SMALL, REWARD)
    run.command("submit", *run.arguments, "--dry-run")
    assert not run.run.exists()
    run.submit()
    run.command("cancel", str(run.run))
    run.wait(30)
    job = run.slurm.submit(run.run / "slurm/learn.sh", "--dependency=afterok:999999", script_arguments=["0", "1"])
    assert run.slurm.wait(job) == ["FAILED"]
    log = (run.run / f"logs/slurm/learn-{job}.log").read_text()
    assert "MissingInputError" in log
    assert not (run.run / "episode=0/learn").exists()


def test_a_waiting_stage_is_told_of_the_jobs_that_now_make_its_input(new_run: Callable[..., Submitted]) -> None:
    run = new_run(*SMALL, REWARD)
    (rollout, score, _) = run.submit("cluster.defaults.sbatch=[--hold]")
    run.slurm("scancel", f"{rollout['jobs'][0]}_1")
    sent = run.sent("cluster.defaults.sbatch=[--hold]")
    assert sent == {"rollout 0": "1"}
    (waiting,) = [
        line for line in run.slurm("squeue", "-h", "-o", "%F|%E").splitlines() if line.startswith(score["jobs"][0])
    ]
    assert len(re.findall(r"afterok:\d+", waiting)) == 2
    run.command("cancel", str(run.run))
    run.wait(30)


@pytest.mark.parametrize(("lookahead", "upstream"), [(0, "learn 1"), (1, "learn 0")])
def test_a_rollout_waits_for_the_policy_that_samples_it(
    new_run: Callable[..., Submitted], lookahead: int, upstream: str
) -> None:
    run = new_run("num_episodes=3", f"pipeline.lookahead={lookahead}", *SMALL[1:])
    lines = run.command("submit", *run.arguments, "--dry-run").splitlines()
    (rollout,) = [line for line in lines if line.startswith("sbatch") and ".rollout.2." in line]
    assert f"--dependency=afterok:<{upstream}> " in rollout


def test_the_five_mistakes_of_a_newcomer_are_one_line_each(new_run: Callable[..., Submitted], task: Path) -> None:
    run = new_run(*SMALL)
    recipe = str(task / "recipe.yaml")
    for arguments, said in (
        ((recipe,), "expected RECIPE... CLUSTER"),
        (
            (recipe, "nowhere"),
            "cluster 'nowhere' is neither a file nor a packaged cluster. Packaged: gpu_cluster, single_node.",
        ),
        ((*run.arguments, "cluster.rollout.partition=gpus"), "rollout job: sbatch: "),
        ((*run.arguments, "--episodes", "3-1"), "expected one number, or an unbroken range"),
        ((*run.arguments, "cluster.learn.tasks=2"), "learn.tasks is unknown"),
    ):
        error = run.command("submit", *arguments, status=2)
        assert said in error
        assert len(error.strip().splitlines()) == 1
    assert run.queue() == []
    assert "no run.json" in run.command("cancel", str(task), status=2)
