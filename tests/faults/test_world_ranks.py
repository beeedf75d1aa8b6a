"""One of two ranks that learn together is killed, late or stuck: they end as documented, and going on gives the same bits."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import link_copy
from fault_log import FaultLog
from helpers import run_command
from oracle import Ended, assert_complete, assert_intact, published
from warm import Started, WarmCommands
from world import MADE_BY, remove

RANK = "a rank of two killed, late or stuck"
LATE_S = 2.0
SETTINGS = (
    "learn.train_batch_size=6", "learn.epochs_per_episode=2", "learn.checkpoint_every_steps=1", "learn.keep_every=1",
    "eval.path=null",
)  # fmt: skip


@pytest.fixture
def ranks(commands: WarmCommands, recipe: list[str]) -> Callable[..., list[Started]]:
    """Both ranks of the second episode, as torchrun would start them; rank 0 stops itself at the `stop_at` of its job."""

    def start(timeout_s: float = 200, **job: object) -> list[Started]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        settings = [*SETTINGS, f"learn.collective_timeout_s={timeout_s}"]
        started = []
        for rank in ("0", "1"):
            variables = {**meeting, "RANK": rank, "LOCAL_RANK": rank}
            mine = job if rank == "0" else {}
            started.append(commands.start("learn", *recipe, *settings, "--episode", 1, environment=variables, **mine))
        return started

    return start


@pytest.fixture
def unlearned(whole_run: Path, tmp_path: Path) -> Path:
    run = link_copy(whole_run, tmp_path / "run")
    remove(run, (*MADE_BY["learn --episode 1"], "evals", "eval_prompts.parquet"))
    return run


@pytest.fixture(scope="module")
def learned_by_two(whole_run: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks learn when nothing happens to them, by the command that starts them itself."""
    run = link_copy(whole_run, tmp_path_factory.mktemp("two") / "run")
    remove(run, (*MADE_BY["learn --episode 1"], "evals", "eval_prompts.parquet"))
    ended = run_command(
        "learn", task / "recipe.yaml", f"run_dir={run}", *SETTINGS, "learn.num_ranks=2", "--episode", "1"
    )
    assert ended.returncode == 0, ended.stderr
    return run


def assert_told(ended: Ended, *statuses: int) -> None:
    """gloo prints warnings of its own; ours is the last line."""
    assert ended.status in statuses, ended
    assert "Traceback" not in ended.said, ended
    if ended.status > 0:
        assert ended.said.splitlines()[-1].split(": ")[0].endswith("Error"), ended


AT = {f"checkpoint {step}": ("os.rename", f"/checkpoint-00000{step}", 1) for step in (1, 4, 7)}
AT["the policy"] = ("os.rename", "episode=1/policy", 1)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", AT)
def test_when_a_rank_is_killed_the_other_ends_and_both_go_on(
    faults: FaultLog, ranks: Callable[..., list[Started]], unlearned: Path, learned_by_two: Path, when: str, victim: int
) -> None:
    with faults.trial(RANK, f"rank {victim} killed before {when}"):
        both = ranks(stop_at=AT[when])
        assert both[0].halts()
        before = published(unlearned)
        os.kill(both[victim].pid, signal.SIGKILL)
        if victim == 1:
            both[0].go_on()
        assert_told(both[victim].wait(), -signal.SIGKILL)
        assert_told(both[1 - victim].wait(), 75)
        assert_intact(unlearned, before)
        for rank in ranks():
            assert_told(rank.wait(), 0)
        assert_complete(unlearned, learned_by_two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_late_changes_nothing(
    faults: FaultLog, ranks: Callable[..., list[Started]], unlearned: Path, learned_by_two: Path, victim: int
) -> None:
    with faults.trial(RANK, f"rank {victim} late by {LATE_S} s"):
        both = ranks(stop_at=AT["checkpoint 4"])
        assert both[0].halts()
        if victim == 1:
            os.kill(both[1].pid, signal.SIGSTOP)
            both[0].go_on()
        time.sleep(LATE_S)
        both[victim].go_on()
        for rank in both:
            assert_told(rank.wait(), 0)
        assert_complete(unlearned, learned_by_two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stuck_ends_the_other_in_time_and_both_go_on(
    faults: FaultLog, ranks: Callable[..., list[Started]], unlearned: Path, learned_by_two: Path, victim: int
) -> None:
    with faults.trial(RANK, f"rank {victim} stuck"):
        both = ranks(timeout_s=6, stop_at=AT["checkpoint 4"])
        assert both[0].halts()
        if victim == 1:
            os.kill(both[1].pid, signal.SIGSTOP)
            both[0].go_on()
        before, start = published(unlearned), time.monotonic()
        assert_told(both[1 - victim].wait(), 75)
        assert time.monotonic() - start < 30
        os.kill(both[victim].pid, signal.SIGCONT)
        assert_told(both[victim].wait(), 75)
        assert_intact(unlearned, before)
        for rank in ranks():
            assert_told(rank.wait(), 0)
        assert_complete(unlearned, learned_by_two)
