"""`verify` on a run that is whole, and on runs with one file damaged, gone or foreign; `repair` and the same command mend them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import FLIP_SMALL, FLIP_WEIGHTS
from fault_log import FaultLog
from helpers import data_files, run_command

from opd_cache.config import Recipe
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.verify.run import Verdict, quarantine, verify_run

ROLLOUTS = "episode=1/rollouts/shard-00001-of-00003.parquet"
SCORES = "episode=0/scores/teacher=main/shard-00002-of-00003.parquet"


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def files_of(verdict: Verdict) -> list[str]:
    return sorted({verdict.name(found.file) for found in verdict.findings})


def test_a_whole_run_is_clean_and_every_data_file_is_read(finished_run: Run) -> None:
    verdict = verify_run(finished_run.dir.path)
    assert [found.problem for found in verdict.findings] == []
    assert verdict.bytes > sum(len(data) for name, data in data_files(finished_run.dir.path).items()) * 0.95


@pytest.mark.parametrize(
    "name",
    [
        "episode=1/plan.json", ROLLOUTS, SCORES,
        "episode=1/rollouts/_SEALED.json", "episode=0/scores/teacher=main/_SEALED.json",
        "episode=0/scores/teacher=main/plan.json", "episode=0/learn/plan.json", "episode=0/learn/steps.parquet",
        "episode=0/policy/model.safetensors", "episode=1/policy/_COMPLETE.json", "episode=1/policy/config.json",
        "episode=0/policy/trainer/optimizer.safetensors", "evals/policy=2/results.parquet",
        "evals/policy=1/mode=greedy/rollouts/shard-00000-of-00001.parquet",
    ],
)  # fmt: skip
def test_a_flipped_bit_is_found_and_its_file_made_anew(
    faults: FaultLog, copied: Path, finished_run: Run, make_recipe: Callable[..., Recipe], name: str
) -> None:
    with faults.trial(FLIP_WEIGHTS if name.endswith(".safetensors") else FLIP_SMALL, f"repair: {name}"):
        flip(copied / name, 0.4)
        verdict = verify_run(copied)
        assert name in [named for found in verdict.to_dict()["findings"] for named in (found["file"], *found["moves"])]
        mend(copied, verdict, make_recipe)
        assert data_files(copied) == data_files(finished_run.dir.path)
        assert verify_run(copied).findings == []
        assert (copied / "quarantine/moved.jsonl").exists()


def mend(path: Path, verdict: Verdict, make_recipe: Callable[..., Recipe]) -> None:
    """Repair, then the commands that it names."""
    quarantine(verdict)
    stages = InlineStages(open_run(make_recipe(path)))
    for again in dict.fromkeys(again for found in verdict.findings for again in found.again):
        _, stage, _, _, number, *_ = again.split()
        stages(stage, int(number))


@pytest.mark.parametrize("name", ["prompts.parquet", "vocab.parquet", "eval_prompts.parquet"])
def test_what_nothing_makes_anew_is_named_and_stays(copied: Path, name: str) -> None:
    flip(copied / name)
    verdict = verify_run(copied)
    assert name in files_of(verdict)
    assert quarantine(verdict) == []
    assert (copied / name).exists()


def test_the_commands_name_the_damage_and_move_it(copied: Path) -> None:
    assert run_command("verify", copied).stdout.startswith("clean: ")
    flip(copied / SCORES)
    found = run_command("verify", copied)
    assert (found.returncode, len(found.stderr.strip().splitlines())) == (2, 1)
    assert f"Run: opd-cache repair {copied}" in found.stderr
    assert found.stdout.startswith(f"{SCORES}: its sha256 is ")
    listed = json.loads(run_command("verify", copied, "--json").stdout)
    assert [(one["file"], one["again"]) for one in listed["findings"]] == [
        (SCORES, ["opd-cache score RECIPE --episode 0 --teacher main"])
    ]
    assert "moved" not in run_command("repair", copied, "--dry-run").stdout
    assert (copied / SCORES).exists()
    mended = run_command("repair", copied)
    assert mended.returncode == 0, mended.stderr
    assert f"moved {SCORES} to quarantine/{SCORES}" in mended.stdout
    assert "make it anew: opd-cache score RECIPE --episode 0 --teacher main" in mended.stdout
    assert (copied / "quarantine" / SCORES).exists()
    assert run_command("verify", copied.parent).returncode == 2


def test_scores_that_an_episode_was_learned_from_are_missed_when_they_are_gone(
    copied: Path, finished_run: Run, make_recipe: Callable[..., Recipe]
) -> None:
    shutil.rmtree(copied / "episode=0/scores")
    (found,) = verify_run(copied).findings
    assert found.problem == f"{copied}/episode=0/scores/teacher=main: missing, though the episode was learned from it"
    assert (found.moves, found.again) == ((), ("opd-cache score RECIPE --episode 0 --teacher main",))
    InlineStages(open_run(make_recipe(copied))).score(0)
    assert data_files(copied) == data_files(finished_run.dir.path)
