"""A whole run: what it leaves behind, and that nothing but the recipe decides what it computes."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import complete, data_files

from opd_cache.config import Recipe, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError, MismatchError, StoreError
from opd_cache.pipeline import InlineStages, run_episodes
from opd_cache.rollout.plan import episode_prompts
from opd_cache.run import Run, open_run
from opd_cache.score.scores import ScoreRequest, TokenScores
from opd_cache.stage import Share
from opd_cache.store.join import read_rollouts
from opd_cache.store.plans import load_rollout_plan, rollout_shards


def test_same_recipe_twice_gives_the_same_bytes(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    again = complete(make_recipe(tmp_path / "again"))
    expected, found = data_files(finished_run.dir.path), data_files(again.dir.path)
    assert len(expected) > 20
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


@pytest.mark.parametrize("width", [2, 5])
def test_any_array_width_and_order_of_tasks_gives_the_same_shards(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path, width: int
) -> None:
    recipe = make_recipe(tmp_path / "array")
    for stage in ("rollout", "score"):
        sealed = [
            getattr(InlineStages(open_run(recipe)), stage)(0, share=Share(task, width))
            for task in reversed(range(width))
        ]
        assert sealed[-1]
    expected = {
        name: data
        for name, data in data_files(finished_run.dir.path).items()
        if "/rollouts/" in name or "/scores/" in name
    }
    found = data_files(tmp_path / "array")
    for name, data in expected.items():
        if name.startswith("episode=0/"):
            assert found[name] == data, name


def test_models_that_are_let_go_between_stages_change_no_bit(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(tmp_path / "apart", "keep_models=false"))
    stages, held = InlineStages(run), []

    def execute(stage: str, number: int) -> None:
        stages(stage, number)
        parts = [part for part in ("sampler", "engine") if part in stages.__dict__]
        held.append((stage, *parts, *stages.scorers))

    run_episodes(run, execute)
    episode = [("rollout", "sampler"), ("score", "main"), ("learn", "engine"), ("eval", "sampler", "main")]
    assert held == [("eval", "sampler", "main"), *episode * run.recipe.num_episodes]
    assert data_files(run.dir.path) == data_files(finished_run.dir.path)


def test_a_large_model_is_not_kept_unless_the_recipe_says_so(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = InlineStages(open_run(make_recipe(tmp_path / "run")))
    monkeypatch.setattr("opd_cache.estimate.KEPT_PARAMETERS", 1000)
    large = InlineStages(open_run(make_recipe(tmp_path / "run")))
    wanted = InlineStages(open_run(make_recipe(tmp_path / "run", "keep_models=true")))
    assert (small.keeps_models, large.keeps_models, wanted.keeps_models) == (True, False, True)


def test_one_shard_can_be_made_by_number(finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    stages = InlineStages(open_run(make_recipe(tmp_path / "one")))
    assert not stages.rollout(0, share=Share(shard=1))
    (shard,) = (tmp_path / "one" / "episode=0" / "rollouts").glob("*.parquet")
    assert shard.name == "shard-00001-of-00003.parquet"
    assert shard.read_bytes() == (finished_run.dir.episode(0).rollouts / shard.name).read_bytes()


def test_seeds_differ_between_prompts_samples_and_episodes(finished_run: Run) -> None:
    responses: list[tuple[int, ...]] = []
    for episode in range(2):
        target = finished_run.dir.episode(episode)
        plan = load_rollout_plan(target)
        shards = rollout_shards(target, plan)
        rows = [rollout for shard in range(plan.num_shards) for rollout in read_rollouts(shards, shard)]
        assert [row.rollout_id for row in rows] == [
            f"{episode}/{prompt}/{sample}"
            for prompt in plan.prompt_indices
            for sample in range(plan.n_samples_per_prompt)
        ]
        responses += [tuple(row.response_ids.tolist()) for row in rows if len(row.response_ids) > 3]
    assert len(responses) > 30
    assert len(set(responses)) == len(responses)


def test_another_seed_gives_other_rollouts(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(tmp_path / "other", "seed=4"))
    InlineStages(run).rollout(0)
    assert (
        load_rollout_plan(run.dir.episode(0)).prompt_indices
        != load_rollout_plan(finished_run.dir.episode(0)).prompt_indices
    )


def test_prompts_are_drawn_without_replacement_until_all_were_used() -> None:
    drawn = [episode_prompts(seed=1, episode=episode, num_prompts=23, prompts_per_episode=5) for episode in range(8)]
    for epoch in (drawn[:4], drawn[4:]):
        assert len({prompt for episode in epoch for prompt in episode}) == 20
    assert drawn[:4] != drawn[4:]
    with pytest.raises(ConfigError, match=r"rollout.prompts_per_episode = 24, but there are only 23 prompts"):
        episode_prompts(seed=1, episode=0, num_prompts=23, prompts_per_episode=24)


def test_rollouts_of_another_policy_are_refused(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A policy that was learned anew does not silently train on what its predecessor sampled."""
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    shutil.rmtree(path / "episode=1" / "policy")
    shutil.rmtree(path / "episode=0" / "policy")
    shutil.rmtree(path / "episode=0" / "learn")
    stages = InlineStages(open_run(make_recipe(path, "learn.learning_rate=0.02")))
    assert stages.learn(0)
    with pytest.raises(
        MismatchError, match=r"episode=1/plan.json: sampled by policy \w{12}, but the policy of version 1 is \w{12}"
    ):
        stages.learn(1)


def test_scores_of_replaced_rollouts_are_refused(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    for name in ("policy", "learn", "rollouts"):
        shutil.rmtree(path / "episode=1" / name)
    (path / "episode=1" / "plan.json").unlink()
    stages = InlineStages(open_run(make_recipe(path, "rollout.temperature=0.8")))
    assert stages.rollout(1)
    with pytest.raises(MismatchError, match=r"scores/teacher=main: the scores were made from other rollouts"):
        stages.learn(1)
    with pytest.raises(
        MismatchError, match=r"scores/teacher=main/plan.json: the scoring of episode 1 was made with rollouts"
    ):
        stages.score(1)


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as its wheel brings it, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parent.parent
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(root),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_brings_its_recipes(wheel_site: Path, tmp_path: Path) -> None:
    """Away from the checkout, the package finds the quickstart by name."""
    command = [sys.executable, "-P", "-m", "opd_cache", "config", "quickstart", "seed=5"]
    environment = {**os.environ, "PYTHONPATH": str(wheel_site)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "seed: 5" in result.stdout, result.stderr
    listed = subprocess.run(
        [*command[:5], "--list"], cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout
    assert str(wheel_site / "opd_cache" / "configs" / "recipes" / "quickstart.yaml") in listed


def test_the_wheel_brings_the_page_and_its_plotting_librarys_licence(wheel_site: Path) -> None:
    web = Path(__file__).parent.parent / "opd_cache" / "report" / "web"
    names = [path.relative_to(web) for path in web.rglob("*") if path.is_file()]
    assert Path("vendor/uplot/LICENSE") in names
    assert [name for name in names if not (wheel_site / "opd_cache" / "report" / "web" / name).is_file()] == []


class NanScorer:
    """A teacher whose numbers overflowed."""

    engine, dtype, window = "nan 1", "float16", 64

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None: ...

    def fingerprint(self) -> str:
        return "nan"

    def load(self) -> None: ...

    def close(self) -> None: ...

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        for request in requests:
            values = np.full(len(request.response_ids), np.nan, np.float32)
            none = np.zeros((len(values), 0), np.int32)
            yield TokenScores(request.key, values, np.ones(len(values), np.int32), none, none.astype(np.float32))


def test_numbers_that_are_no_logprobs_are_never_published(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = open_run(make_recipe(tmp_path / "run", "score.top_k=0", "learn.loss.name=reverse_kl_pg"))
    stages = InlineStages(run)
    stages.rollout(0)
    stages.scorers["main"] = NanScorer(run.recipe.teachers["main"], run.recipe.score)
    with pytest.raises(
        StoreError,
        match=r"the scorer \(nan 1, float16\) gave 0/\d+/0: teacher_logprobs holds NaN; a log-prob is at most 0",
    ):
        stages.score(0)
    assert not list(run.dir.episode(0).scores("main").glob("shard-*"))


def test_an_episode_learned_from_a_policy_that_is_gone_is_refused(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    for name in ("policy", "learn"):
        shutil.rmtree(path / "episode=0" / name)
    with pytest.raises(
        MismatchError, match=r"episode=1/policy: trained from policy \w{12}, but policy version 1 is now \w{12}"
    ):
        complete(make_recipe(path, "learn.learning_rate=0.02", "eval.path=null"))


def test_another_dtype_inside_an_episode_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    InlineStages(open_run(make_recipe(tmp_path / "run"))).rollout(0, share=Share(shard=0))
    with pytest.raises(MismatchError, match=r'the plan of episode 0 was made with dtype = "float32", now "bfloat16"'):
        InlineStages(open_run(make_recipe(tmp_path / "run", "student.dtype=bfloat16"))).rollout(0)


def test_responses_that_would_not_fit_the_students_context_are_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    stages = InlineStages(open_run(make_recipe(tmp_path / "run", "rollout.max_new_tokens=60")))
    with pytest.raises(
        ConfigError, match=r"a prompt of \d+ tokens and rollout.max_new_tokens = 60 exceed the student's context of 64"
    ):
        stages.rollout(0)


def test_each_stage_needs_its_own_parts_only(
    finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A learner's container has no scorer's packages, and the other way round."""
    path = tmp_path / "run"
    shutil.copytree(finished_run.dir.path, path)
    shutil.rmtree(path / "episode=1" / "policy")
    elsewhere = ("rollout.sampler=not_here:Sampler", "score.scorer=not_here:Scorer")
    assert InlineStages(open_run(make_recipe(path, *elsewhere))).learn(1)
    with pytest.raises(
        ConfigError, match=r"rollout.sampler = 'not_here:Sampler' cannot be loaded: No module named 'not_here'"
    ):
        InlineStages(open_run(make_recipe(path, *elsewhere))).rollout(2)


def test_of_several_teachers_one_at_a_time_is_in_memory(
    task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    more = [f"teachers.second.model={task}/student", "learn.teacher=main"]
    stages = InlineStages(open_run(make_recipe(tmp_path / "run", *more)))
    stages.rollout(0)
    first = stages.scorer("main", 0)
    assert stages.score(0)
    assert stages.scorers == {}
    assert first._model is None
    assert len(list(tmp_path.glob("run/episode=0/scores/teacher=*/_SEALED.json"))) == 2
