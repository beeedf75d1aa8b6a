"""System calls that fail as a full disk, a quota, a broken disk or a file server that went away makes them fail."""

import pytest
from fault import Fault
from fault_log import FaultLog, is_full
from oracle import (
    assert_complete,
    assert_ends_as,
    assert_intact,
    assert_said,
    published,
    temporaries,
)  # fmt: skip
from stages import STAGES, Stages
from trials import every_fault

CALLS = ("openat", "write", "fsync", "close", "link", "mkdir", "rename")
STATUSES = {"ENOSPC": 75, "EDQUOT": 75, "ESTALE": 75, "EIO": 2}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_call_that_fails_is_named_and_nothing_short_is_published(
    stages: Stages, faults: FaultLog, stage: str, call: str
) -> None:
    with every_fault(faults, "ENOSPC, EDQUOT, EIO, ESTALE at a system call") as trial:
        for number, error in failures(stages.numbers(stage, call, at_most=1), list(STATUSES)):
            with trial(f"{stage}, {call} {number}: {error}"):
                assert_survives(stages, stage, Fault(call, number, "fail", error), STATUSES[error])


@pytest.mark.parametrize("call", ["write", "fsync", "openat"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_stays_full_is_named_and_nothing_short_is_published(
    stages: Stages, faults: FaultLog, stage: str, call: str
) -> None:
    with every_fault(faults, "a system call fails from then on") as trial:
        for number, error in failures(stages.numbers(stage, call, at_most=1), ["ENOSPC", "EIO"]):
            with trial(f"{stage}, {call} {number}: {error}"):
                assert_survives(stages, stage, Fault(call, number, "fail from here", error), STATUSES[error])


@pytest.mark.parametrize("stage", STAGES)
def test_a_write_that_falls_short_is_continued(stages: Stages, faults: FaultLog, stage: str) -> None:
    with every_fault(faults, "a write falls short") as trial:
        for number in stages.numbers(stage, "write", at_most=2):
            with trial(f"{stage}, write {number}"):
                assert_survives(stages, stage, Fault("write", number, "short"), 0)


def failures(numbers: list[int], errors: list[str]) -> list[tuple[int, str]]:
    """Which calls fail, and how: at every call of a stage the errors take turns, at a few each has its own."""
    if is_full():
        return [(number, errors[number % len(errors)]) for number in numbers]
    return [(number, error) for error in errors for number in numbers]


def assert_survives(stages: Stages, stage: str, fault: Fault, status: int) -> None:
    """It ends with this status, or the call did not matter and all is there."""
    undisturbed = stages.done(stage)[0]
    with stages.fresh(stage) as run:
        before = published(run)
        ended, _, place = stages.run(stage, run, fault)
        assert place
        if ended.status == 0:
            assert_complete(run, undisturbed)
        else:
            # Arrow does not tell the number of what fails at the close of a file.
            assert_said(ended, status, *((2,) if fault.call == "close" else ()))
            # No name is known of a file that fails when it is read or closed.
            assert str(run.parent) in ended.said or "a file of the run" in ended.said
        assert_intact(run, before)
        if (fault.call, fault.action) != ("openat", "fail from here"):  # no folder can be removed without opening it
            assert temporaries(run) == []
        assert_ends_as(run, undisturbed, lambda: stages.again(stage, run))
