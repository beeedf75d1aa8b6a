"""A wall clock that is wrong, or jumps while a run goes on, changes nothing of what is made or removed."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import link_copy
from fault_log import DataLostError, FaultLog
from oracle import assert_complete, assert_said, published, temporaries
from warm import WarmCommands
from world import MADE_BY, remove

CLOCK = "a clock that is wrong or jumps"
HOUR = 3600
NEGATIVE = re.compile(r"[ |]-\d[\d.]* (s|tok/s)")  # a duration or a rate in the log


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommands]:
    """Commands whose wall clock goes as their environment says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc) is installed to build tests/faults/shifted_clock.c with")
    library, source = tmp_path_factory.mktemp("clock") / "shifted_clock.so", Path(__file__).with_name("shifted_clock.c")
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, source, "-ldl"], check=True)
    server = WarmCommands(tmp_path_factory.mktemp("said"), LD_PRELOAD=str(library))
    yield server
    server.close()


CLOCKS = {
    "an hour ahead": {"CLOCK_SHIFT_S": HOUR},
    "an hour behind": {"CLOCK_SHIFT_S": -HOUR},
    "before 1970": {"CLOCK_SHIFT_S": -100 * 365 * 24 * HOUR},
    "jumping back an hour, early": {"CLOCK_JUMP_AFTER": 20, "CLOCK_JUMP_S": -HOUR},
    "jumping back an hour, late": {"CLOCK_JUMP_AFTER": 200, "CLOCK_JUMP_S": -HOUR},
    "jumping ahead a day": {"CLOCK_JUMP_AFTER": 60, "CLOCK_JUMP_S": 24 * HOUR},
}


def environment(clock: str) -> dict[str, str]:
    return {name: str(value) for name, value in CLOCKS[clock].items()}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_run_under_a_wrong_clock_makes_the_same_data(
    faults: FaultLog, shifted: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, clock: str
) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, (*MADE_BY["rollout --episode 1"], "logs"))
    with faults.trial(CLOCK, f"run: {clock}"):
        ended = shifted.run("run", *recipe, environment=environment(clock))
        assert ended.status == 0, ended
        assert not NEGATIVE.search(ended.said), ended.said
        for note in (run / "logs").rglob("*.json"):
            assert json.loads(note.read_text()).get("seconds", 0) >= 0, note
        assert_complete(run, whole_run)


def other_machines(folder: Path, age_s: float) -> Path:
    """A temporary that a process of another machine is writing, as old as that."""
    path = folder / f".shard-00000-of-00003.parquet.other-{socket.gethostname()}.1.0123abcd.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.mark.parametrize("clock", CLOCKS)
def test_gc_under_a_wrong_clock_removes_what_is_dead_and_nothing_else(
    faults: FaultLog, commands: WarmCommands, shifted: WarmCommands, whole_run: Path, recipe: list[str],
    tmp_path: Path, clock: str,
) -> None:  # fmt: skip
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, MADE_BY["rollout --episode 1"])
    late = commands.start("rollout", *recipe, "--episode", 1, stop_at=("os.link", "/shard-00001-of-00003.parquet", 1))
    assert late.halts()
    (own,) = temporaries(run)
    fresh, old = other_machines(run, 10), other_machines(run / "episode=0", 2 * HOUR)
    for age_s in (-HOUR, 0, 10 * 24 * HOUR):
        with faults.trial(CLOCK, f"gc: {clock}, a living writer's file dated {age_s} s ago"):
            os.utime(run / own, (time.time() - age_s,) * 2)
            assert_said(shifted.run("gc", run, environment=environment(clock)), 0)
            if own not in temporaries(run) or not fresh.exists():
                raise DataLostError("gc has removed what a living process writes")
            assert not old.exists()
    late.go_on()
    assert late.wait().status == 0
    fresh.unlink()
    assert commands.run("run", *recipe).status == 0
    assert_complete(run, whole_run)


@pytest.mark.parametrize("age_s", [-24 * HOUR, 100 * 365 * 24 * HOUR], ids=["in the future", "long past"])
def test_files_dated_wrongly_are_as_good_as_any(
    faults: FaultLog, shifted: WarmCommands, whole_run: Path, recipe: list[str], tmp_path: Path, age_s: float
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    for path in run.rglob("*"):
        os.utime(path, (time.time() - age_s,) * 2)
    before = published(run)
    for look in ("verify", "status", "run"):
        with faults.trial(CLOCK, f"{look}: every file dated {age_s} s ago"):
            ended = shifted.run(look, *(recipe if look == "run" else [run]), environment=environment("an hour behind"))
            assert ended.status == 0, ended
            assert published(run) == before
    assert_complete(run, whole_run)
