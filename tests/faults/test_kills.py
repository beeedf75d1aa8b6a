"""SIGKILL before every system call on the run directory, of every stage."""

import pytest
from fault import CALLS, Fault
from fault_log import FaultLog
from oracle import assert_complete, assert_ends_as, assert_intact, assert_said, published
from stages import STAGES, Stages
from trials import every_fault

# How often a stage makes a call at least: what is not there could not be interfered with.
LEAST_CALLS = {
    "open": {"openat": 10, "write": 3, "fsync": 6, "close": 10, "link": 3, "unlink": 3, "mkdir": 1},
    "rollout": {"openat": 20, "write": 4, "fsync": 10, "close": 20, "link": 4, "unlink": 4, "mkdir": 3, "rename": 2},
    "score": {"openat": 20, "write": 4, "fsync": 10, "close": 20, "link": 4, "unlink": 4, "mkdir": 3, "rename": 2},
    "learn": {"openat": 40, "write": 10, "fsync": 20, "close": 40, "link": 2, "unlink": 5, "mkdir": 6, "rename": 3},
    "eval": {"openat": 40, "write": 8, "fsync": 20, "close": 40, "link": 8, "unlink": 8, "mkdir": 6, "rename": 3},
    "replay": {"openat": 40, "write": 10, "fsync": 20, "close": 40, "link": 8, "unlink": 5, "mkdir": 6, "rename": 2},
}


def test_the_shim_sees_every_kind_of_call(stages: Stages) -> None:
    for stage, least in LEAST_CALLS.items():
        counts = stages.done(stage)[1]
        assert {call: counts[call] for call in least if counts[call] < least[call]} == {}, stage


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_any_call_the_same_command_ends_as_if_undisturbed(
    stages: Stages, faults: FaultLog, stage: str, call: str
) -> None:
    with every_fault(faults, "SIGKILL before the Nth system call") as trial:
        for number in stages.numbers(stage, call, at_most=3):
            with trial(f"{stage}, {call} {number}"), stages.fresh(stage) as run:
                before = published(run)
                ended, _, _ = stages.run(stage, run, Fault(call, number, "kill"))
                assert_said(ended, -9)
                assert_intact(run, before)
                assert_ends_as(run, stages.done(stage)[0], lambda run=run: stages.again(stage, run))


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_that_comes_too_late_leaves_the_stage_untouched(stages: Stages, stage: str) -> None:
    """There is no call that the kills above have missed."""
    for call in CALLS:
        with stages.fresh(stage) as run:
            number = stages.done(stage)[1][call] + 1
            ended, _, place = stages.run(stage, run, Fault(call, number, "kill"))
            assert (ended.status, place) == (0, ""), (call, number, ended)
            assert_complete(run, stages.done(stage)[0])
