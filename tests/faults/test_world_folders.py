"""Folders that cannot be written to, that vanish, or that are no folders: one line, nothing lost, and then it goes on."""

import shutil
from pathlib import Path

import pytest
from damage import link_copy
from fault_log import FaultLog
from oracle import assert_complete, assert_intact, assert_said, findings, published
from warm import WarmCommands
from world import MADE_BY, NOBODY, give_to, needs_root, remove

READ_ONLY = "a folder that is read-only or another user's"
VANISHED = "a folder removed between two stages and during one"
NO_FOLDER = "a path component that is a file, a dangling link"
STAGES = [command for command in MADE_BY if command != "rollout --episode 0"]


@needs_root
@pytest.mark.parametrize("owner", [0, NOBODY], ids=["another_users", "read_only"])
@pytest.mark.parametrize("command", STAGES)
def test_what_cannot_be_written_to_is_named_and_stays_as_it_is(
    faults: FaultLog, commands: WarmCommands, reachable: tuple[Path, list[str]], command: str, owner: int
) -> None:
    folder, settings = reachable
    run = Path(shutil.copytree(folder / "whole", folder / "run"))
    recipe, (stage, *options) = [*settings, f"run_dir={run}"], command.split()
    try:
        remove(run, MADE_BY[command])
        give_to(run, owner)
        for path in (run, *(path for path in run.rglob("*") if path.is_dir())):
            path.chmod(0o555 if owner == NOBODY else 0o755)
        before = published(run)
        with faults.trial(READ_ONLY, f"{command}, {'another user owns it' if owner == 0 else 'mode 555'}"):
            ended = commands.run(stage, *recipe, *options, user=NOBODY)
            assert_said(ended, 2)
            assert "PermissionError" in ended.said or "ermission denied" in ended.said
            assert published(run) == before
            assert "run.json" not in before or findings(run) == []
            assert commands.run("run", *recipe).status == 0
            assert_complete(run, folder / "whole")
    finally:
        shutil.rmtree(run)


@needs_root
def test_looking_at_a_run_of_another_user_writes_nothing(
    faults: FaultLog, commands: WarmCommands, reachable: tuple[Path, list[str]]
) -> None:
    folder, settings = reachable
    run, looks = folder / "whole", ("verify", "status", "gc", "query")
    before = sorted(run.rglob("*"))
    for look in looks:
        more = ["select count(*) from rollouts"] if look == "query" else []
        with faults.trial(READ_ONLY, f"{look} by another user"):
            ended = commands.run(look, run, *more, user=NOBODY, environment={"HOME": "/nonexistent"})
            assert ended.status == 0, ended
    with faults.trial(READ_ONLY, "run by another user, all done"):
        ended = commands.run("run", *settings, f"run_dir={run}", user=NOBODY)
        assert ended.status == 0, ended
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "gone", ["", "episode=1", "episode=1/rollouts", "episode=1/scores", "episode=0/policy", "logs"]
)
@pytest.mark.parametrize("stage", ["rollout", "score", "learn"])
def test_a_folder_removed_between_two_stages_is_missed_or_made_again(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, stage: str, gone: str
) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[f"{stage} --episode 1"])
    if (run / gone).exists():
        shutil.rmtree(run / gone)
    before = published(run) if run.exists() else {}
    with faults.trial(VANISHED, f"{gone or 'the run'} before {stage}"):
        ended = commands.run(stage, *recipe, "--episode", 1)
        assert_said(ended, 0, 2)
        assert all((run / name).read_bytes() == data for name, data in before.items())
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)


# Stage, right before which operation, what is removed.
DURING = (
    ("rollout", ("os.link", "/shard-00001-of-00003.parquet", 1), "episode=1/rollouts"),
    ("rollout", ("os.link", "/shard-00001-of-00003.parquet", 1), "episode=1"),
    ("rollout", ("os.link", "/shard-00001-of-00003.parquet", 1), ""),
    ("rollout", ("open", "rollouts/.shard-00002", 1), "episode=1/rollouts"),
    ("rollout", ("open", "rollouts/.shard-00002", 1), ""),
    ("rollout", ("os.link", "/_SEALED.json", 1), "episode=1/rollouts"),
    ("score", ("os.link", "/shard-00001-of-00003.parquet", 1), "episode=1/scores"),
    ("score", ("os.link", "/shard-00001-of-00003.parquet", 1), "episode=1/rollouts"),
    ("score", ("open", "teacher=main/.shard-00002", 1), ""),
    ("learn", ("os.link", "learn/plan.json", 1), "episode=1/learn"),
    ("learn", ("os.rename", "/checkpoint-000001", 1), "episode=1/learn"),
    ("learn", ("os.rename", "/policy", 1), "episode=1"),
    ("learn", ("os.rename", "/policy", 1), ""),
)


@pytest.mark.parametrize(
    ("stage", "when", "gone"), DURING, ids=[f"{gone or 'run'} in {stage} at {when[1]}" for stage, when, gone in DURING]
)
def test_a_folder_removed_during_a_stage_ends_it_with_one_line_or_is_made_again(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path,
    stage: str, when: tuple[str, str, int], gone: str,
) -> None:  # fmt: skip
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[f"{stage} --episode 1"])
    kept = {name: data for name, data in published(run).items() if not name.startswith(gone)}
    with faults.trial(VANISHED, f"{gone or 'the run'} during {stage}, before {when[0]} of {when[1]}"):
        settings = ["learn.checkpoint_every_steps=1"] if stage == "learn" else []
        ended = commands.run(stage, *recipe, *settings, "--episode", 1, do_at=(*when, str(run / gone)))
        assert_said(ended, 0, 2, 75)
        assert all((run / name).read_bytes() == data for name, data in kept.items() if gone)
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)


OBSTACLES = {
    "rollout --episode 1": (
        "", "episode=1", "episode=1/plan.json", "episode=1/rollouts", "episode=1/rollouts/shard-00001-of-00003.parquet",
        "episode=1/rollouts/_SEALED.json", "logs/rollout",
    ),
    "score --episode 1": (
        "episode=1/scores", "episode=1/scores/teacher=main", "episode=1/scores/teacher=main/plan.json",
        "episode=1/scores/teacher=main/shard-00000-of-00003.parquet",
    ),
    "learn --episode 1": ("episode=1/learn", "episode=1/learn/plan.json", "episode=1/policy"),
    "eval --policy-version 2": ("evals/policy=2", "evals/policy=2/results.parquet", "evals/policy=2/summary.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "dangling link"])
@pytest.mark.parametrize(
    ("command", "place"), [(command, place) for command, places in OBSTACLES.items() for place in places]
)
def test_what_is_no_folder_or_leads_nowhere_is_named(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path,
    command: str, place: str, kind: str,
) -> None:  # fmt: skip
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[command])
    obstacle = run / place
    if obstacle.is_dir():
        shutil.rmtree(obstacle)
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    stage, *options = command.split()
    with faults.trial(NO_FOLDER, f"{place or 'the run'} is a {kind}: {command}"):
        if kind == "file":
            obstacle.write_text("")
        else:
            obstacle.symlink_to("nowhere")
        before = {name: data for name, data in published(run).items() if name != place} if run.is_dir() else {}
        ended = commands.run(stage, *recipe, *options)
        assert_said(ended, 2)
        assert str(obstacle) in ended.said
        obstacle.unlink()
        assert_intact(run, before) if run.is_dir() else None
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)
