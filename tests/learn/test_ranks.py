"""Several ranks learn what one would: real processes, gloo, killed and stopped at any step."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from commands import Command
from helpers import run_command
from safetensors.torch import load_file

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError
from opd_cache.learn.ranks import ALONE, Ranks, rank_from_environment
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.run import Run, open_run

# 5 steps an epoch of 24 rollouts, the last batch ragged; four epochs.
SETTINGS = ["learn.train_batch_size=5", "learn.epochs_per_episode=4", "learn.max_tokens_per_micro_batch=40"]
STEPS = 20


def run_team(world: int, recipe: list[str], episode: int = 0, **job: Any) -> dict[str, Any]:
    """What rank_team.py printed."""
    script = str(Path(__file__).with_name("rank_team.py"))
    content = json.dumps({"world": world, "recipe": recipe, "episode": episode, **job})
    ended = subprocess.run([sys.executable, script, content], capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture
def unlearned(finished_run: Run, tmp_path: Path) -> Path:
    """A run whose first episode is sampled and scored, but not learned."""
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    shutil.rmtree(path / "episode=1")
    for folder in ("learn", "policy"):
        shutil.rmtree(path / "episode=0" / folder)
    return path


def learned(source: Path, path: Path, make_recipe: Callable[..., Recipe], *settings: str) -> Path:
    """A copy of an unlearned run, learned by one rank in this process."""
    shutil.copytree(source, path)
    run = open_run(make_recipe(path, *SETTINGS, *settings))
    assert learn_episode(run, 0, new_engine(run))
    return path


def steps_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path / "episode=0/learn/steps.parquet").to_pylist()


def weights_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "episode=0/policy").rglob("*.safetensors"))}


def recipe_arguments(task: Path, path: Path, *settings: str) -> list[str]:
    return [str(task / "recipe.yaml"), f"run_dir={path}", *SETTINGS, *settings]


def assert_same_losses(found: Path, expected: Path) -> None:
    ours, theirs = steps_of(found), steps_of(expected)
    assert len(theirs) == STEPS
    for two, one in zip(ours, theirs, strict=True):
        for key in ("loss", "reverse_kl", "reverse_kl_p99", "kl_penalty", "ess", "entropy", "grad_norm"):
            assert two[key] == pytest.approx(one[key], abs=1e-5), (one["step"], key)
        assert (two["tokens"], two["rollouts"], two["step"]) == (one["tokens"], one["rollouts"], one["step"])


@pytest.mark.parametrize("loss", ["reverse_kl_topk", "reverse_kl_pg"])
def test_two_ranks_have_the_losses_of_one(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path, loss: str
) -> None:
    settings = [f"learn.loss.name={loss}", "learn.loss.discount=0.5", "learn.kl_coef=0.1"]
    alone = learned(unlearned, tmp_path / "alone", make_recipe, *settings)
    result = run_team(2, recipe_arguments(task, unlearned, *settings))
    assert result["statuses"] == [[0, 0]]
    assert_same_losses(unlearned, alone)


def deepspeed_settings(stage: int, *more: str) -> list[str]:
    # By default DeepSpeed leaves parameters as small as a test's whole on every rank.
    shared = ["learn.deepspeed.zero_options={stage3_param_persistence_threshold: 0}"] if stage == 3 else []
    return ["learn.engine=deepspeed", f"learn.deepspeed.zero_stage={stage}", *shared, *more]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_deepspeed_ranks_have_the_losses_of_one_torch_rank(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path, stage: int
) -> None:
    alone = learned(unlearned, tmp_path / "alone", make_recipe)
    result = run_team(2, recipe_arguments(task, unlearned, *deepspeed_settings(stage)))
    assert result["statuses"] == [[0, 0]]
    assert_same_losses(unlearned, alone)
    ours, theirs = (load_file(path / "episode=0/policy/model.safetensors") for path in (unlearned, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "settings"), [
    (2, ["learn.lora.rank=4", "learn.kl_coef=0.1"]),
    (3, ["learn.lora.rank=4", "learn.kl_coef=0.1"]),
    (2, ["learn.deepspeed.offload_optimizer=true"]),
    (3, ["learn.deepspeed.offload_optimizer=true", "learn.gradient_checkpointing=full"]),
    (2, ["learn.gradient_checkpointing=selective"]),
], ids=["lora-2", "lora-3", "offload-2", "offload-and-recompute-3", "recompute-2"])  # fmt: skip
def test_what_deepspeed_can_be_asked_for_has_the_losses_of_one_torch_rank(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path, stage: int, settings: list[str]
) -> None:
    for_torch = [setting for setting in settings if "deepspeed" not in setting]
    alone = learned(unlearned, tmp_path / "alone", make_recipe, *for_torch)
    # Stopped once by a kill: what it goes on from is whole.
    recipe = recipe_arguments(task, unlearned, *deepspeed_settings(stage, "learn.checkpoint_every_steps=4", *settings))
    result = run_team(2, recipe, kills=1, steps_a_life=12, seed=3)
    assert sorted(result["statuses"][0]) == [-9, 75]
    assert result["statuses"][-1] == [0, 0]
    assert_same_losses(unlearned, alone)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_multiplies_in_bfloat16_and_keeps_float32_weights(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path, stage: int
) -> None:
    alone = learned(unlearned, tmp_path / "alone", make_recipe)
    result = run_team(2, recipe_arguments(task, unlearned, *deepspeed_settings(stage, "learn.precision=bfloat16")))
    assert result["statuses"] == [[0, 0]]
    differences = [
        abs(two["loss"] - one["loss"]) for two, one in zip(steps_of(unlearned), steps_of(alone), strict=True)
    ]
    assert 1e-5 < max(differences) < 0.05
    weights = load_file(unlearned / "episode=0/policy/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_pass_between_engines_and_numbers_of_ranks(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path, stage: int
) -> None:
    """Eight steps by two DeepSpeed ranks, eight by one torch rank, four by three DeepSpeed ranks: the losses of one."""
    alone = learned(unlearned, tmp_path / "alone", make_recipe)
    ranks = recipe_arguments(task, unlearned, *deepspeed_settings(stage, "learn.keep_every=8"))
    assert run_team(2, ranks)["statuses"] == [[0, 0]]

    def back_to(step: int) -> None:
        shutil.rmtree(unlearned / "episode=0/policy")
        (unlearned / "episode=0/learn/steps.parquet").unlink()
        for folder in unlearned.glob("episode=0/learn/checkpoint-*"):
            if int(folder.name.rpartition("-")[2]) > step:
                shutil.rmtree(folder)

    back_to(8)
    run = open_run(make_recipe(unlearned, *SETTINGS, "learn.keep_every=8"))
    assert learn_episode(run, 0, new_engine(run))
    assert_same_losses(unlearned, alone)
    back_to(16)
    result = run_team(3, ranks)
    assert result["statuses"] == [[0, 0, 0]]
    assert [step for step, _ in result["steps"][0]] == [16, 17, 18, 19]
    assert_same_losses(unlearned, alone)


def assert_every_row_once_an_epoch(steps: list[list[Any]], path: Path, epochs: int) -> None:
    """In the steps that made the policy; and a step that was taken again had the same rows."""
    taken = dict(steps)
    for step, rows in steps:
        assert rows == taken[step]
    in_order = [row for step in sorted(taken) for row in taken[step]]
    every = pq.read_table(path / "episode=0/rollouts", columns=["rollout_id"], partitioning=None)
    assert in_order == every["rollout_id"].to_pylist() * epochs


@pytest.mark.slow
def test_killed_twenty_times_two_ranks_end_with_the_same_bits(task: Path, unlearned: Path, tmp_path: Path) -> None:
    undisturbed = Path(shutil.copytree(unlearned, tmp_path / "undisturbed"))
    settings = ["learn.checkpoint_every_steps=1", "learn.loss.name=reverse_kl_pg", "learn.epochs_per_episode=8"]
    assert run_team(2, recipe_arguments(task, undisturbed, *settings))["statuses"] == [[0, 0]]
    result = run_team(2, recipe_arguments(task, unlearned, *settings), kills=20, steps_a_life=2, seed=1)
    *killed, last = result["statuses"]
    assert last == [0, 0]
    # The rank that was not killed says that it lost its partner, and may be tried again.
    assert [sorted(statuses) for statuses in killed] == [[-9, 75]] * 20
    assert weights_of(unlearned) == weights_of(undisturbed)
    for steps in result["steps"]:
        assert_every_row_once_an_epoch(steps, unlearned, epochs=8)
    timings = {"read_s", "compute_s", "tokens_per_s"}
    for ours, theirs in zip(steps_of(unlearned), steps_of(undisturbed), strict=True):
        assert {k: v for k, v in ours.items() if k not in timings} == {
            k: v for k, v in theirs.items() if k not in timings
        }


def test_another_number_of_ranks_goes_on_and_uses_every_row_once(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path
) -> None:
    """Two ranks die between two checkpoints, three go on: what is learned stays the same, to float order."""
    alone = learned(unlearned, tmp_path / "alone", make_recipe)
    recipe = recipe_arguments(task, unlearned, "learn.checkpoint_every_steps=4")
    result = run_team(2, recipe, kills=1, steps_a_life=12, seed=3, last_world=3)
    died, went_on = result["statuses"]
    assert sorted(died) == [-9, 75]
    assert went_on == [0, 0, 0]
    first_life, whole = result["steps"][2], result["steps"][0]
    assert 4 <= first_life[0][0] < STEPS - 4  # the third rank came in after a checkpoint, not at the start
    assert_every_row_once_an_epoch(whole, unlearned, epochs=4)
    for ours, theirs in zip(steps_of(unlearned), steps_of(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_the_command_starts_its_ranks_and_says_what_went_wrong_once(task: Path, unlearned: Path) -> None:
    recipe = recipe_arguments(task, unlearned, "learn.num_ranks=2")
    seal = unlearned / "episode=0/scores/teacher=main/_SEALED.json"
    kept = seal.read_bytes()
    seal.unlink()
    ended = run_command("learn", *recipe, "--episode", "0")
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if "Error" in line]
    assert lines[0].startswith("MissingInputError: ")
    assert lines[1:] == ["RankFailedError: rank 0 ended with status 2; see above."]
    assert ended.stdout == ""
    assert not (unlearned / "episode=0/learn").exists()
    seal.write_bytes(kept)
    ended = run_command("learn", *recipe, "--episode", "0")
    assert ended.returncode == 0, ended.stderr
    assert len(steps_of(unlearned)) == STEPS


def test_torchrun_starts_ranks_that_learn_what_one_does(
    task: Path, make_recipe: Callable[..., Recipe], unlearned: Path, tmp_path: Path
) -> None:
    alone = learned(unlearned, tmp_path / "alone", make_recipe)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "opd_cache",
    ]
    command = [*torchrun, "learn", *recipe_arguments(task, unlearned), "--episode", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert_same_losses(unlearned, alone)


def start_rank(start: Callable[..., Command], rank: int, port: int, **environment: str) -> Command:
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start("learn", *SETTINGS, "--episode", "0", **ranks, **meeting, **environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("launches", [("one", "two"), ("one", "")])
def test_ranks_of_two_launches_of_one_job_part_again(
    start: Callable[..., Command], unlearned: Path, launches: tuple[str, str]
) -> None:
    port = free_port()
    ranks = [start_rank(start, rank, port, OPD_CACHE_LAUNCH=launch) for rank, launch in enumerate(launches)]
    for rank, command in enumerate(ranks):
        line = command.ends(60)
        assert (
            f"TryAgainError: rank {rank} met ranks of another launch at 127.0.0.1:{port} (OPD_CACHE_LAUNCH is " in line
        )
        assert all(repr(launch) in line for launch in launches)
    assert not (unlearned / "episode=0/learn").exists()


def test_ranks_of_one_launch_learn_together(start: Callable[..., Command], unlearned: Path) -> None:
    port = free_port()
    ranks = [start_rank(start, rank, port, OPD_CACHE_LAUNCH="one") for rank in range(2)]
    for command in ranks:
        assert command.process.wait(120) == 0
    assert len(steps_of(unlearned)) == STEPS


def test_a_meeting_point_in_use_may_be_tried_again(start: Callable[..., Command], unlearned: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = start_rank(start, 0, port).ends(60)
    assert line.startswith(f"TryAgainError: 127.0.0.1:{port}, where the ranks meet, is in use")


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, ALONE),
    ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Ranks(1, 4, 1)),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ALONE),
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Ranks(3, 4, 1)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALONE),  # a batch script, outside of srun
])  # fmt: skip
def test_a_process_knows_its_rank_from_torchrun_or_srun(environment: dict[str, str], expected: Ranks) -> None:
    assert rank_from_environment(environment) == expected


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE, LOCAL_RANK in the environment must be whole numbers"):
        rank_from_environment({"RANK": "one", "WORLD_SIZE": "2"})
