"""Every file of a finished run, damaged: verify names it, the stage that reads it refuses it, repair and `run` mend it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from damage import CUT, FLIP_SMALL, FLIP_WEIGHTS, GONE, assert_found, drawn, files_of, flipped, link_copy, put, replaced
from fault_log import FaultLog, SilentError, is_full
from helpers import differences
from oracle import Ended, assert_complete, assert_intact, assert_said, published
from trials import every_fault
from warm import WarmCommands
from world import remove

LENGTHS = 40  # of each file, in full mode; every length of a shard is tried in test_damage_shards.py


def lengths(name: str, size: int) -> list[int]:
    """Where to cut a file."""
    if not is_full():
        return [*drawn(name, size, 1)] if size > 1 else [0]
    return sorted({0, size - 1, *drawn(name, size, min(size, LENGTHS))})


def test_verify_names_a_cut_file_and_no_other(faults: FaultLog, whole_run: Path, tmp_path: Path) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    before = published(run)
    with every_fault(faults, CUT) as trial:
        for name in files_of(run):
            whole = (run / name).read_bytes()
            for length in lengths(name, len(whole)):
                with trial(f"verify: {name}, {length} of {len(whole)} bytes"), replaced(run / name, whole[:length]):
                    assert_found(run, before, name)


def test_verify_names_a_deleted_file_that_nothing_can_do_without(
    faults: FaultLog, whole_run: Path, tmp_path: Path
) -> None:
    run = link_copy(whole_run, tmp_path / "run")
    before = published(run)
    # What is not there was never made: the commands make these again by themselves.
    made_again = ("run.json", "steps.parquet", "summary.json", "results.parquet")
    with every_fault(faults, GONE) as trial:
        for name in files_of(run):
            with trial(f"verify: {name}"), replaced(run / name, None):
                kept = {other: data for other, data in before.items() if other != name}
                if not name.endswith(made_again) or "policy/" in name:
                    assert_found(run, kept, name)


class Reading(NamedTuple):
    """A file, the command that reads it, and what of a finished run must be gone for it to do so."""

    file: str
    command: str
    without: tuple[str, ...] = ()


EPISODE, LEARNED = ("episode=1", "evals/policy=2"), ("episode=1/learn", "episode=1/policy", "evals/policy=2")
POLICY, CHECKPOINT = "episode=0/policy", "episode=1/learn/checkpoint-000002"
RESUMED = ("episode=1/policy", "episode=1/learn/steps.parquet", "evals/policy=2")
SCORES, EVAL = "episode=1/scores/teacher=main", "evals/policy=2"
GRADED = (f"{EVAL}/summary.json", f"{EVAL}/results.parquet")
READINGS = (
    Reading("run.json", "rollout --episode 1"),
    Reading("prompts.parquet", "rollout --episode 1"),
    Reading("vocab.parquet", "score --episode 1", ("episode=1/scores", *LEARNED)),
    Reading("episode=1/plan.json", "rollout --episode 1", ("episode=1/rollouts/_SEALED.json",)),
    Reading("episode=1/rollouts/shard-00001-of-00003.parquet", "score --episode 1", ("episode=1/scores", *LEARNED)),
    Reading("episode=1/rollouts/_SEALED.json", "score --episode 1", ("episode=1/scores", *LEARNED)),
    Reading(f"{SCORES}/plan.json", "learn --episode 1", LEARNED),
    Reading(f"{SCORES}/shard-00001-of-00003.parquet", "learn --episode 1", LEARNED),
    Reading(f"{SCORES}/_SEALED.json", "learn --episode 1", LEARNED),
    Reading(f"{POLICY}/_COMPLETE.json", "rollout --episode 1", EPISODE),
    Reading(f"{POLICY}/config.json", "rollout --episode 1", EPISODE),
    Reading(f"{POLICY}/model.safetensors", "rollout --episode 1", EPISODE),
    Reading(f"{POLICY}/model.safetensors", "learn --episode 1", LEARNED),
    Reading(f"{POLICY}/trainer/state.json", "learn --episode 1", LEARNED),
    Reading(f"{POLICY}/trainer/optimizer.safetensors", "learn --episode 1", LEARNED),
    Reading("episode=1/policy/model.safetensors", "eval --policy-version 2", (EVAL,)),
    Reading("episode=1/learn/plan.json", "learn --episode 1", RESUMED),
    Reading(f"{CHECKPOINT}/_COMPLETE.json", "learn --episode 1", RESUMED),
    Reading(f"{CHECKPOINT}/model.safetensors", "learn --episode 1", RESUMED),
    Reading(f"{CHECKPOINT}/trainer/state.json", "learn --episode 1", RESUMED),
    Reading(f"{CHECKPOINT}/trainer/optimizer.safetensors", "learn --episode 1", RESUMED),
    Reading("eval_prompts.parquet", "eval --policy-version 2", (EVAL,)),
    Reading(f"{EVAL}/mode=greedy/plan.json", "eval --policy-version 2", GRADED),
    Reading(f"{EVAL}/mode=sampled/rollouts/shard-00000-of-00001.parquet", "eval --policy-version 2", GRADED),
    Reading(f"{EVAL}/mode=sampled/scores/teacher=main/shard-00000-of-00001.parquet", "eval --policy-version 2", GRADED),
    Reading(f"{EVAL}/results.parquet", "eval --policy-version 2", GRADED[:1]),
    Reading(f"{EVAL}/summary.json", "eval --policy-version 2"),
)  # fmt: skip
# Nothing makes these anew, and what is asked for anew without them would be another run.
LOST = ("prompts.parquet", "vocab.parquet", "eval_prompts.parquet")


class Damage(NamedTuple):
    row: str
    what: str
    data: bytes | None


def damages(file: str, whole: bytes) -> Iterator[Damage]:
    """A flipped bit, a cut, and no file at all; in full mode many of them."""
    bits, cuts = (12, 6) if is_full() else (1, 1)
    row = FLIP_WEIGHTS if file.endswith(".safetensors") else FLIP_SMALL
    for bit in drawn(file, 8 * len(whole), bits):
        yield Damage(row, f"bit {bit}", flipped(whole, bit))
    for length in drawn(f"cut {file}", len(whole), cuts):
        yield Damage(CUT, f"{length} of {len(whole)} bytes", whole[:length])


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: f"{reading.file} by {reading.command}")
def test_the_stage_that_reads_a_damaged_file_refuses_it_and_it_can_be_mended(
    faults: FaultLog,
    commands: WarmCommands,
    whole_run: Path,
    plain_run: Path,
    recipe: list[str],
    tmp_path: Path,
    reading: Reading,
) -> None:
    stage, *options = reading.command.split()
    expected, more = (whole_run, []) if stage == "eval" else (plain_run, ["eval.path=null"])
    for damage in damages(reading.file, (expected / reading.file).read_bytes()):
        run = link_copy(expected, tmp_path / "run")
        remove(run, reading.without)
        before = published(run)
        with faults.trial(damage.row, f"{reading.command}: {reading.file}, {damage.what}"):
            put(run / reading.file, damage.data)
            ended = commands.run(stage, *recipe, *options)
            assert_refused_or_harmless(ended, run, expected, reading)
            if ended.status == 0 and reading.file == f"{EVAL}/results.parquet":
                # The summary was made from it: what counts is that its rows are those of the undisturbed run.
                assert pq.read_table(run / reading.file).equals(pq.read_table(expected / reading.file))
            else:
                assert_intact_but_for(run, before, reading.file)
            if reading.file == "run.json" or ended.status == 0 or (damage.row == CUT and not is_full()):
                shutil.rmtree(run)
                continue
            repaired = commands.run("repair", run)
            assert_said(repaired, 2 if reading.file in LOST else 0)
            if reading.file in LOST:
                put(run / reading.file, (expected / reading.file).read_bytes())
            again = commands.run("run", *recipe, *more)
            assert again.status == 0, again
            assert_complete(run, expected)
        shutil.rmtree(run)


def assert_refused_or_harmless(ended: Ended, run: Path, expected: Path, reading: Reading) -> None:
    """Status 2 and a line; or a bit that nobody reads, in Parquet's page index or statistics."""
    if ended.status != 0:
        assert_said(ended, 2)
        return
    made = ("/rollouts/", "/scores/", "/policy/")
    other = [name for name in differences(run, expected) if name != reading.file and (run / name).exists()]
    if not reading.file.endswith(".parquet") or any(part in name for name in other for part in made):
        raise SilentError(f"{reading.command} took it for whole: {other}")


def assert_intact_but_for(run: Path, before: dict[str, bytes], file: str) -> None:
    if file == "run.json":
        assert_found(run, before, file)
    elif (run / file).read_bytes() != before.get(file):
        assert_intact(run, before, [file])
