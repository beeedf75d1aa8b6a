"""Too few files, threads, bytes of memory or seconds: one clear line or a signal, nothing short, and then it goes on."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from damage import link_copy
from fault_log import FaultLog, SilentError, is_full
from oracle import Ended, assert_complete, assert_intact, assert_said, findings, published
from warm import WarmCommands
from world import MADE_BY, NOBODY, give_to, needs_root, remove

from opd_cache import errors

FILES = "RLIMIT_NOFILE too small"
MEMORY = "RLIMIT_AS too small"
PROCESSES = "RLIMIT_NPROC too small"
FILE_SIZE = "RLIMIT_FSIZE too small"
SECONDS = "RLIMIT_CPU used up"
COMMANDS = ("rollout --episode 1", "score --episode 1", "learn --episode 1", "eval --policy-version 2")
MIB = 1 << 20
OURS = [
    kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OpdCacheError)
]
OUR_LINE = re.compile(rf"({'|'.join(OURS)}): \S")  # a library's last words may stand before and after it


def limits(few: list[int], many: range) -> list[int]:
    return list(many) if is_full() else few


def try_limit(
    commands: WarmCommands, whole_run: Path, recipe: list[str], run: Path, command: str, **job: object
) -> Ended:
    """The command under a limit, and what must hold whatever came of it."""
    link_copy(whole_run, run)
    remove(run, MADE_BY[command])
    before = published(run)
    stage, *options = command.split()
    ended = commands.run(stage, *recipe, *options, **job)
    assert_ended_in_words(ended)
    assert_intact(run, before)
    again = commands.run("run", *recipe)
    assert again.status == 0, again
    assert_complete(run, whole_run)
    shutil.rmtree(run)
    return ended


def assert_ended_in_words(ended: Ended) -> None:
    """All went well, or one line, or a signal; where a library had no memory left for an exception, its own last words."""
    if "Traceback" in ended.said:
        raise SilentError(ended.said)
    if ended.status in (2, 75):
        assert sum(OUR_LINE.match(line) is not None for line in ended.said.splitlines()) == 1, ended


@pytest.mark.parametrize("command", COMMANDS)
def test_too_few_open_files_are_named(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, command: str
) -> None:
    statuses = {}
    for limit in limits([4, 8], range(4, 40)):
        with faults.trial(FILES, f"{command}: {limit} files"):
            ended = try_limit(commands, whole_run, recipe, tmp_path / "run", command, limits={"NOFILE": limit})
            statuses[limit] = ended.status
            if ended.status:
                assert_said(ended, 2, 75)
                assert "oo many open files" in ended.said
    assert statuses[min(statuses)] != 0


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_memory_ends_a_stage_and_nothing_else(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, command: str
) -> None:
    held = address_space(commands.process.pid)
    for more in limits([1, 24], range(0, 400, 8)):
        with faults.trial(MEMORY, f"{command}: {more} MiB more than at its start"):
            try_limit(commands, whole_run, recipe, tmp_path / "run", command, limits={"AS": held + more * MIB})


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_small_limit_of_file_size_publishes_nothing_short(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, command: str
) -> None:
    for limit in limits([1000], range(500, 6000, 500)):
        with faults.trial(FILE_SIZE, f"{command}: {limit} bytes"):
            ended = try_limit(commands, whole_run, recipe, tmp_path / "run", command, limits={"FSIZE": limit})
            assert_said(ended, 75, *((0,) if limit > 2000 else ()))  # that much may be enough


@pytest.mark.parametrize("command", COMMANDS)
def test_the_status_says_it_where_the_line_finds_no_room(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, command: str
) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY[command])
    before, (stage, *options) = published(run), command.split()
    with faults.trial(FILE_SIZE, f"{command}: 0 bytes"):
        assert commands.run(stage, *recipe, *options, limits={"FSIZE": 0}) == Ended(75, "")
        assert_intact(run, before)
        assert commands.run("run", *recipe).status == 0
        assert_complete(run, whole_run)


@pytest.mark.parametrize("command", ["rollout --episode 1", "learn --episode 1"])
def test_a_command_out_of_cpu_time_is_ended_by_a_signal_and_can_go_on(
    faults: FaultLog, commands: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, command: str
) -> None:
    with faults.trial(SECONDS, f"{command}: 1 s"):
        # 1 s may be enough for the tiny stage: then it is made longer by many more samples or epochs, of no run to keep.
        ended = try_limit(commands, whole_run, recipe, tmp_path / "run", command, limits={"CPU": 1})
        assert ended.status in (0, -signal.SIGXCPU, -signal.SIGKILL), ended


@needs_root
@pytest.mark.parametrize("command", COMMANDS[:3])
def test_too_few_processes_end_a_stage_with_one_line(
    faults: FaultLog,
    commands: WarmCommands,
    reachable: tuple[Path, list[str]],
    command: str,
) -> None:
    folder, settings = reachable
    run = Path(shutil.copytree(folder / "whole", folder / "run"))
    recipe, (stage, *options) = [*settings, f"run_dir={run}"], command.split()
    try:
        remove(run, MADE_BY[command])
        give_to(run, NOBODY)
        before = published(run)
        with faults.trial(PROCESSES, f"{command}: no thread more"):
            ended = commands.run(stage, *recipe, *options, user=NOBODY, limits={"NPROC": 1})
            assert_ended_in_words(ended)
            assert all((run / name).read_bytes() == data for name, data in before.items())
            assert findings(run) == []
            assert commands.run("run", *recipe).status == 0
            assert_complete(run, folder / "whole")
    finally:
        shutil.rmtree(run)
