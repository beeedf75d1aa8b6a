"""Stages as tasks of users' own Slurm arrays and steps, on a real Slurm."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import data_files
from slurm_cluster import Slurm, batch_script

from opd_cache.errors import ConfigError
from opd_cache.launch.slurm_tasks import array_share
from opd_cache.run import Run
from opd_cache.stage import Share


def in_array(index: int, first: int, last: int, count: int) -> dict[str, str]:
    values = {"ID": index, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 1, 2, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([1, 2, 3], [(0, 3), (1, 3), (2, 3)]),
        ([3, 5, 6, 7], [(3, 8), (5, 8), (6, 8), (7, 8)]),
        ([4], [(0, 1)]),
    ],
)
def test_the_tasks_of_an_array_share_the_shards(indices: list[int], expected: list[tuple[int, int]]) -> None:
    found = [array_share(in_array(index, indices[0], indices[-1], len(indices))) for index in indices]
    assert found == expected


def test_outside_an_array_everything_is_this_process_own() -> None:
    assert array_share({"SLURM_JOB_ID": "4"}) == (0, 1)


def test_half_an_array_in_the_environment_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"must all be whole numbers") as caught:
        array_share({"SLURM_ARRAY_TASK_ID": "0"})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        array_share({**in_array(0, 0, 1, 2), "SLURM_ARRAY_TASK_ID": "x"})


def test_every_shard_is_some_tasks() -> None:
    shares = [Share(*array_share(in_array(index, 0, 2, 3))) for index in range(3)]
    made = [shard for share in shares for shard in share.of(list(range(10)))]
    assert sorted(made) == list(range(10))


@pytest.fixture
def same_run(finished_run: Run, task: Path, tmp_path: Path) -> Callable[[str], str]:
    """The command line of a stage for a run that is to become the same as the finished one."""
    settings = f"{task}/recipe.yaml run_dir={tmp_path}/run"
    return lambda stage: f"opd-cache {stage} {settings}"


def test_arrays_and_a_step_of_two_ranks_make_the_same_run(
    slurm: Slurm, same_run: Callable[[str], str], finished_run: Run, tmp_path: Path
) -> None:
    """Plain scripts of a user's own: two arrays, of other widths and first indices, then a step on two nodes."""
    lines = [
        "#SBATCH --output=%x-%A_%a.log --open-mode=append",
        "set -eu",
        "export OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK=1",
        same_run('"$1"') + ' --episode "$2"',
    ]
    script = batch_script(tmp_path / "stage.sh", lines)
    lines[-1] = f"srun --kill-on-bad-exit=1 {same_run('learn')} --episode 0"
    learn = batch_script(tmp_path / "learn.sh", lines)
    where = f"--chdir={tmp_path}"
    rollout = slurm.submit(script, where, "--array=0-3", script_arguments=("rollout", "0"))
    score = slurm.submit(
        script, where, "--array=1-2", f"--dependency=afterok:{rollout}", script_arguments=("score", "0")
    )
    step = slurm.submit(learn, where, "--nodes=2", "--ntasks=2", f"--dependency=afterok:{score}")
    assert slurm.wait(step) == ["COMPLETED"], [path.read_text() for path in tmp_path.glob("*.log")]
    expected = {name: data for name, data in data_files(finished_run.dir.path).items() if "episode=1" not in name}
    found = data_files(tmp_path / "run")
    shards = {name for name in expected if "/rollouts/" in name or "/scores/" in name}
    assert len(shards) == 9
    assert {name for name in shards if found[name] != expected[name]} == set()
    assert (tmp_path / "run/episode=0/policy/_COMPLETE.json").exists()
