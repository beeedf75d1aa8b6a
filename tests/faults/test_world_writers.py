"""Several processes that make the same thing: one of them wins, and all of them, and the run, are well."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import link_copy
from fault_log import FaultLog, SilentError, is_full
from oracle import Ended, assert_complete, assert_intact, assert_said, published
from store_helpers import file_names, rollout_set
from warm import WarmCommands
from worker_client import Worker
from world import MADE_BY, remove

TOGETHER = "several writers of one thing at once"
STOPPED = "a writer stopped right before its commit while another commits"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("warm"))
    yield worker
    worker.close()


@pytest.mark.parametrize(("num_processes", "rounds"), [(2, 5), (8, 2)])
@pytest.mark.parametrize("work", ["publish_own_file", "publish_own_folder", "publish_own_shard"])
def test_of_racing_writers_one_wins_and_its_bytes_stay(
    faults: FaultLog, worker: Worker, tmp_path: Path, work: str, num_processes: int, rounds: int
) -> None:
    for attempt in range(rounds * (10 if is_full() else 1)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with faults.trial(TOGETHER, f"{num_processes} processes: {work}, {attempt}"):
            ended = worker.race(work, folder, num_processes)
            assert {status for status, _ in ended} == {0}, ended
            assert sorted(said for _, said in ended) == ["false"] * (num_processes - 1) + ["true"]
            assert_one_whole_result(work, folder)


def assert_one_whole_result(work: str, folder: Path) -> None:
    if work == "publish_own_file":
        lines = (folder / "file").read_bytes().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1
        assert file_names(folder) == ["file"]
    elif work == "publish_own_folder":
        assert (folder / "folder" / "a").read_text() == (folder / "folder" / "b").read_text()
        assert file_names(folder) == ["folder"]
    else:
        shards = rollout_set(folder)
        with shards.open(0) as file:
            assert file.read().num_rows == 20
        assert file_names(shards.folder) == [os.path.basename(shards.path(0))]


@pytest.mark.parametrize("command", MADE_BY)
@pytest.mark.parametrize("num_processes", [2, 8] if is_full() else [2])
def test_the_same_command_several_times_at_once_gives_one_whole_run(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path,
    command: str, num_processes: int,
) -> None:  # fmt: skip
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[command])
    before = published(run)
    stage, *options = command.split()
    with faults.trial(TOGETHER, f"{num_processes} processes: opd-cache {command}"):
        ended = commands.race([[stage, *recipe, *options]] * num_processes)
        for one in ended:
            assert_said(one, 0)
        assert_intact(run, before)
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)


@pytest.mark.parametrize("num_processes", [8])
def test_eight_processes_that_open_one_run_make_it_once(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, num_processes: int
) -> None:
    run = tmp_path / "run"
    sampling = ["rollout", *recipe, "--episode", "0"]
    with faults.trial(TOGETHER, f"{num_processes} processes: a new run, a share of its rollouts each"):
        shares = [[*sampling, "--task", task, "--num-tasks", num_processes] for task in range(num_processes)]
        for one in commands.race(shares):
            assert_said(one, 0)
        for name, data in published(run).items():
            if name != "run.json":  # which holds run_dir
                assert data == (whole_run / name).read_bytes(), name
        assert (run / "episode=0/rollouts/_SEALED.json").exists()


# The command, what of a finished run is gone, and the operation that commits one thing.
COMMITS = (
    ("rollout --episode 0", "run", ("os.link", "/run.json", 1)),
    ("rollout --episode 0", "run", ("os.link", "/prompts.parquet", 1)),
    ("rollout --episode 1", "rollout --episode 1", ("os.link", "episode=1/plan.json", 1)),
    ("rollout --episode 1", "rollout --episode 1", ("os.link", "/shard-00001-of-00003.parquet", 1)),
    ("rollout --episode 1", "rollout --episode 1", ("os.link", "/_SEALED.json", 1)),
    ("score --episode 1", "score --episode 1", ("os.link", "teacher=main/plan.json", 1)),
    ("score --episode 1", "score --episode 1", ("os.link", "/shard-00002-of-00003.parquet", 1)),
    ("score --episode 1", "score --episode 1", ("os.link", "/_SEALED.json", 1)),
    ("learn --episode 1", "learn --episode 1", ("os.link", "learn/plan.json", 1)),
    ("learn --episode 1 learn.checkpoint_every_steps=1", "learn --episode 1", ("os.rename", "/checkpoint-000001", 1)),
    ("learn --episode 1", "learn --episode 1", ("os.rename", "/policy", 1)),
    ("eval --policy-version 2", "eval --policy-version 2", ("os.link", "/results.parquet", 1)),
    ("eval --policy-version 2", "eval --policy-version 2", ("os.link", "/summary.json", 1)),
)


@pytest.mark.parametrize(
    ("command", "made_by", "commit"), COMMITS, ids=[commit[1] + " by " + command for command, _, commit in COMMITS]
)
def test_a_writer_that_commits_late_finds_the_other_ones_work(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path,
    command: str, made_by: str, commit: tuple[str, str, int],
) -> None:  # fmt: skip
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[made_by])
    stage, *options = command.split()
    with faults.trial(STOPPED, f"{command}: {commit[0]} of {commit[1]}"):
        late = commands.start(stage, *recipe, *options, stop_at=commit)
        assert late.halts()
        other = commands.run(stage, *recipe, *options)
        before = published(run)
        late.go_on()
        assert_ended_well(late.wait())
        assert_ended_well(other)
        assert_intact(run, before)
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)


def assert_ended_well(ended: Ended) -> None:
    if ended.status not in (0, 75):
        raise SilentError(f"{ended}")
