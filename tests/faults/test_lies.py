"""Writes that say they wrote everything and did not: found when read back, and never taken for data."""

import json
from pathlib import Path

import pytest
from fault import LIES, Fault
from fault_log import FaultLog, SilentError
from oracle import assert_complete, assert_ends_as, assert_intact, assert_said, published
from stages import STAGES, Stages
from trials import every_fault

OF_THE_TIME = ("state.json", "steps.parquet", "_COMPLETE.json", "run.json", "replay.json", "recipe.yaml")


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_write_that_lies_is_found_before_anything_is_published(
    stages: Stages, faults: FaultLog, stage: str, lie: str
) -> None:
    with every_fault(faults, "a write that lies") as trial:
        for number in stages.numbers(stage, "write", at_most=2):
            with trial(f"{stage}, write {number} {lie}"):
                assert_found(stages, stage, Fault("write", number, lie))


def assert_found(stages: Stages, stage: str, fault: Fault) -> None:
    """Nothing of what the write should have written is there, or all that it says is true."""
    undisturbed = stages.done(stage)[0]
    with stages.fresh(stage) as run:
        before = published(run)
        ended, _, place = stages.run(stage, run, fault)
        assert place
        assert_said(ended, 0, 2)
        assert_intact(run, before)
        assert_no_other_bytes(run, undisturbed)
        if ended.status == 0:
            assert_complete(run, undisturbed)
        assert_ends_as(run, undisturbed, lambda: stages.again(stage, run))


def assert_no_other_bytes(run: Path, undisturbed: Path) -> None:
    """Every file under a final name has the bytes of the undisturbed run, or at least says what can be read."""
    expected = published(undisturbed)
    for name, data in published(run).items():
        if not name.endswith(OF_THE_TIME):
            if data != expected[name]:
                raise SilentError(f"{name}: published with other bytes")
        elif name.endswith(".json"):
            found = json.loads(data)
            if found.keys() != json.loads(expected[name]).keys():
                raise SilentError(f"{name}: published with other keys")
