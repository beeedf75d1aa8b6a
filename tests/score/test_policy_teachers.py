"""Policies of the run as teachers: the one that sampled, a fixed one, and either with a prompt of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import complete

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError, MismatchError, MissingInputError
from opd_cache.pipeline import InlineStages
from opd_cache.replay import replay_run
from opd_cache.run import Run, open_run
from opd_cache.store.join import join_stages
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards
from opd_cache.types import Rollout, Score

SELF = "teachers={self: {model: 'policy:current'}, initial: {model: 'policy:0'}}"
HINTED = "teachers={hinted: {model: 'policy:current', prompt: {template: '{prompt} {answer} '}}}"


def own_recipe(make_recipe: Callable[..., Recipe], task: Path, path: Path, teachers: str, *settings: str) -> Recipe:
    """The shared recipe with other teachers in place of its own."""
    from opd_cache.recipes import load_recipe

    text = (task / "recipe.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith("teachers:")]
    file = path.with_suffix(".yaml")
    file.write_text("\n".join(kept))
    return load_recipe([str(file), f"run_dir={path}", teachers, *settings])


@pytest.fixture(scope="module")
def distilled(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """Two episodes learned from the initial student, all in one process, and also scored by the policy that sampled."""
    path = tmp_path_factory.mktemp("policies") / "run"
    # A rate at which two policies differ by far more than rounding.
    return complete(
        own_recipe(make_recipe, task, path, SELF, "learn.teacher=initial", "learn.learning_rate=0.02")
    ), path


def joined(run: Run, episode: int, teacher: str) -> list[tuple[Rollout, Score]]:
    target = run.dir.episode(episode)
    plan = load_rollout_plan(target)
    return list(join_stages(rollout_shards(target, plan), score_shards(target, plan, teacher)))


def largest_gap(rows: list[tuple[Rollout, Score]]) -> float:
    gaps = [np.abs(rollout.sampling_logprobs - score.teacher_logprobs).max(initial=0) for rollout, score in rows]
    return float(max(gaps))


def test_the_policy_that_sampled_gives_its_own_logprobs_in_every_episode(distilled: tuple[Run, Path]) -> None:
    run, _ = distilled
    for episode in (0, 1):
        assert largest_gap(joined(run, episode, "self")) < 1e-4
    assert largest_gap(joined(run, 0, "initial")) < 1e-4
    assert largest_gap(joined(run, 1, "initial")) > 0.1


def test_the_plan_says_which_weights_scored(distilled: tuple[Run, Path]) -> None:
    run, _ = distilled
    for episode in (0, 1):
        plans = {
            name: json.loads((run.dir.episode(episode).scores(name) / "plan.json").read_text())["teacher_fingerprint"]
            for name in ("self", "initial")
        }
        assert plans == {"self": run.policy_fingerprint(episode), "initial": run.student_fingerprint}
    assert run.policy_fingerprint(1) != run.student_fingerprint


def test_evaluations_of_a_policy_are_against_the_fixed_one(distilled: tuple[Run, Path]) -> None:
    run, _ = distilled
    summaries = [
        json.loads((run.dir.evaluation(f"policy={version}") / "summary.json").read_text()) for version in (0, 2)
    ]
    assert summaries[0]["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert summaries[1]["reverse_kl"] > 0.01
    assert not run.dir.evaluation("teacher=initial").exists()


def test_self_distillation_from_a_prompt_with_the_answer_runs_and_replays(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path
) -> None:
    run = complete(own_recipe(make_recipe, task, tmp_path / "run", HINTED, "eval.path=null"))
    rows = pq.read_table(run.dir.steps(0)).to_pylist()
    assert all(abs(row["reverse_kl"]) > 1e-3 for row in rows)
    comparison = replay_run(run.dir.path, tmp_path / "replay", None, [])
    assert [entry["same_weights"] for entry in comparison["episodes"]] == [True, True]


def test_a_policy_that_is_not_there_yet_is_named(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path
) -> None:
    stages = InlineStages(
        open_run(own_recipe(make_recipe, task, tmp_path / "run", "teachers={a: {model: 'policy:2'}}"))
    )
    stages.rollout(0)
    with pytest.raises(
        MissingInputError, match=r"policy version 2 is not there. Run: opd-cache learn RECIPE --episode 1"
    ):
        stages.score(0)


def test_another_policy_of_that_version_is_not_taken_for_the_one_that_sampled(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path, distilled: tuple[Run, Path]
) -> None:
    path = Path(shutil.copytree(distilled[1], tmp_path / "run"))
    for name in ("episode=1/learn", "episode=1/policy", "episode=0/learn", "episode=0/policy", "episode=1/scores"):
        shutil.rmtree(path / name)
    stages = InlineStages(open_run(own_recipe(make_recipe, task, path, SELF, "learn.teacher=initial")))
    assert stages.learn(0)
    with pytest.raises(
        MismatchError, match=r"sampled by policy \w{12}, but policy version 1 of this run is \w{12}; teach"
    ):
        stages.score(1)
    assert not (path / "episode=1/scores").exists()


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ("{model: 'policy:best'}", "teachers.a.model = 'policy:best': expected policy:current, "),
        ("{model: 'policy:-1'}", "teachers.a.model = 'policy:-1': expected policy:current, "),
        ("{model: 'policy:0', dtype: float32}", "teachers.a.dtype = 'float32' has no effect: a policy of the run "),
    ],
)
def test_what_is_no_policy_is_refused(
    make_recipe: Callable[..., Recipe], task: Path, tmp_path: Path, teacher: str, fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        own_recipe(make_recipe, task, tmp_path / "run", f"teachers={{a: {teacher}}}")
    assert str(caught.value).startswith(fault)
