"""`verify --deep`: the models score a sample of rows again, and find what no digest can."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_verified, complete, run_command, save_model, tiny_qwen2

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError, ModelError
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.stage import score_episode
from opd_cache.verify.run import verify_deeply

SCORES = "episode=1/scores/teacher=main"


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))


def test_a_clean_run_passes_and_says_what_was_compared(finished_run: Run) -> None:
    done = run_command("verify", finished_run.dir.path, "--deep", "--rows", "5")
    assert done.returncode == 0, done.stderr
    teacher, student, last = done.stdout.splitlines()
    assert teacher.startswith("teacher main: 5 rows, ")
    assert student.startswith("student: 5 rows, ")
    assert last.startswith("clean: ")
    compared = verify_deeply(finished_run.dir.path, 1000, 1, ()).compared or []
    assert [(one.who, one.rows, one.skipped) for one in compared] == [("teacher main", 48, []), ("student", 48, [])]
    assert all(one.tokens > 48 and 0 < one.largest < 1e-4 for one in compared)


class OtherWeights(HFScorer):
    """Passes for the run's teacher, and is another model."""

    def fingerprint(self) -> str:
        return self.claimed

    claimed = ""


def test_scores_of_another_teacher_under_valid_digests_are_found_by_deep_alone(
    copied: Path, task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(copied))
    folder = copied / SCORES
    OtherWeights.claimed = json.loads((folder / "plan.json").read_text())["teacher_fingerprint"]
    for path in [*folder.glob("shard-*"), folder / "_SEALED.json"]:
        path.unlink()
    other = save_model(tiny_qwen2(seed=9, hidden_size=48), tmp_path / "other")
    config = replace(run.recipe.teachers["main"], model=str(other))
    assert score_episode(run, 1, "main", OtherWeights(config, run.recipe.score))
    assert_verified(copied)
    found = run_command("verify", copied, "--deep", "--rows", "8", "--json")
    assert found.returncode == 2
    assert f"opd-cache repair {copied} --deep --rows 8 --seed 0" in found.stderr
    findings = json.loads(found.stdout)["findings"]
    assert {one["file"].rpartition("/")[0] for one in findings} == {SCORES}
    assert all(
        " row " in one["problem"] and "scored again alone differs by up to" in one["problem"] for one in findings
    )
    shard = int(findings[0]["file"].rpartition("/")[2].split("-")[1])
    assert findings[0]["again"] == [f"opd-cache score RECIPE --episode 1 --teacher main --shard {shard}"]
    assert run_command("repair", copied, "--deep", "--rows", "48").returncode == 0
    assert not list(folder.glob("shard-*"))
    InlineStages(run).score(1)
    assert verify_deeply(copied, 12, 0, ()).findings == []


def test_a_16_bit_teacher_passes(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ("num_episodes=1", "teachers.main.dtype=bfloat16", "student.dtype=bfloat16", "eval.path=null")
    run = complete(make_recipe(tmp_path / "run", *overrides))
    verdict = verify_deeply(run.dir.path, 8, 0, ())
    assert verdict.findings == []
    assert [one.rows for one in verdict.compared or ()] == [8, 8]


def test_a_model_that_is_not_here_or_another_one_is_said(copied: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        verify_deeply(copied, 2, 0, ("teachers.main.model=/not/here",))
    with pytest.raises(MismatchError, match=r"teacher main is .* with weights .* its log-probs are of weights"):
        verify_deeply(copied, 2, 0, (f"teachers.main.model={task}/student",))
    moved = Path(shutil.copytree(task / "teacher", tmp_path / "moved"))
    assert verify_deeply(copied, 2, 0, (f"teachers.main.model={moved}",)).findings == []
    refused = run_command("verify", copied, f"teachers.main.model={moved}")
    assert (refused.returncode, "only --deep" in refused.stderr) == (2, True)


def test_a_server_that_does_not_answer_means_try_again(copied: Path) -> None:
    away = ("teachers.main.scorer=http", "score.http.urls=[http://127.0.0.1:9]", "score.http.max_retries=0")
    ended = run_command("verify", copied, "--deep", "--rows", "1", *away)
    assert ended.returncode == 75, ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("TryAgainError: http://127.0.0.1:9: ")


def test_a_policy_that_was_removed_is_left_out_and_named(copied: Path) -> None:
    removed = run_command("gc", copied, "learn.keep_policies.last=1", "learn.keep_policies.best=false")
    assert removed.returncode == 0, removed.stderr
    verdict = verify_deeply(copied, 4, 0, ())
    assert verdict.findings == []
    student = (verdict.compared or [])[-1]
    assert student.skipped == ["episode 1: policy 1 was removed by the retention rule"]
    assert student.rows == 4
