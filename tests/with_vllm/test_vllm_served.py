"""The score stage and the http scorer on top of a real vLLM server."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import opd_cache_command
from near import assert_same_topk
from served_vllm import ServedVllm

from opd_cache.config import HttpOptions, Recipe, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.run_dir import SEAL
from opd_cache.score.scorers.http import HTTPScorer
from opd_cache.score.scores import ScoreRequest
from opd_cache.store.join import join_stages
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards
from opd_cache.types import Rollout, Score

TOP_K = 8
SCORES = "episode=0/scores/teacher=main"

RecipeOf = Callable[..., Recipe]


@pytest.fixture(scope="module")
def served(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVllm]:
    server = ServedVllm(teacher_folder, "teacher", tmp_path_factory.mktemp("served") / "log")
    try:
        server.ready()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def overrides(teacher_folder: Path) -> list[str]:
    """12 shards of 8 rollouts, and the teacher that is served."""
    rollouts = ["n_samples_per_prompt=8", "prompts_per_shard=1", "max_new_tokens=40"]
    return [*(f"rollout.{rollout}" for rollout in rollouts), f"teachers.main.model={teacher_folder}"]


@pytest.fixture(scope="module")
def recipe_of(make_recipe: RecipeOf, overrides: list[str]) -> RecipeOf:
    return lambda path, *more: make_recipe(path, *overrides, *more)


@pytest.fixture(scope="module")
def sampled(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the rollouts of episode 0, by the hf sampler. Shared: copy it."""
    run = open_run(recipe_of(tmp_path_factory.mktemp("sampled") / "run"))
    InlineStages(run).rollout(0)
    return run


@pytest.fixture
def run_path(sampled: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sampled.dir.path, tmp_path / "run"))


def by_server(url: str, top_k: int = 0, **options: object) -> list[str]:
    quick = {"urls": [url], "max_retries": 2, "retry_base_delay_s": 0.05, "concurrency": 4, **options}
    return ["score.scorer=http", f"score.http={json.dumps(quick)}", f"score.top_k={top_k}"]


def scored(recipe: Recipe) -> list[tuple[Rollout, Score]]:
    """Score episode 0 and read it back."""
    run = open_run(recipe)
    assert InlineStages(run).score(0)
    target = run.dir.episode(0)
    plan = load_rollout_plan(target)
    return list(join_stages(rollout_shards(target, plan), score_shards(target, plan, "main")))


@pytest.fixture(scope="module")
def scored_by_hf(
    recipe_of: RecipeOf, sampled: Run, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[tuple[Rollout, Score]]]:
    """What the hf scorer says, by top k."""
    folder = tmp_path_factory.mktemp("by_hf")
    paths = {top_k: Path(shutil.copytree(sampled.dir.path, folder / str(top_k))) for top_k in (0, TOP_K)}
    return {top_k: scored(recipe_of(path, f"score.top_k={top_k}")) for top_k, path in paths.items()}


@pytest.mark.parametrize("top_k", [0, TOP_K])
@pytest.mark.parametrize("api", ["auto", "vllm_generate", "vllm_completions"])
def test_a_served_teachers_scores_are_the_hf_scorers(
    served: ServedVllm,
    recipe_of: RecipeOf,
    run_path: Path,
    scored_by_hf: dict[int, list[tuple[Rollout, Score]]],
    api: str,
    top_k: int,
) -> None:
    found = scored(recipe_of(run_path, *by_server(served.url, top_k, api=api)))
    assert len(found) == len(scored_by_hf[top_k]) == 96
    differences = []
    for (rollout, scores), (_, by_hf) in zip(found, scored_by_hf[top_k], strict=True):
        assert scores.ids_hash == rollout.ids_hash
        assert np.shape(scores.topk_ids) == (len(rollout.response_ids), top_k)
        difference = np.abs(np.subtract(scores.teacher_logprobs, by_hf.teacher_logprobs))
        differences += [*difference, *assert_same_topk(scores, by_hf, 2e-5).flat]
        assert (np.array(scores.teacher_rank) > 0).all()
    print(
        f"{api}, k = {top_k}: max {max(differences):.1e}, mean {np.mean(differences):.1e}, {len(differences)} log-probs"
    )
    assert max(differences) <= 2e-5


def scorer_of(served: ServedVllm, teacher_folder: Path, top_k: int = 0, **options: object) -> HTTPScorer:
    http = HttpOptions(urls=[served.url], **{"max_retries": 2, "retry_base_delay_s": 0.05, **options})  # type: ignore[arg-type]
    return HTTPScorer(TeacherConfig(model=str(teacher_folder)), ScoreConfig(scorer="http", top_k=top_k, http=http))


def test_auto_finds_the_way_of_ids_in_and_ids_out(served: ServedVllm, teacher_folder: Path) -> None:
    scorer = scorer_of(served, teacher_folder)
    scorer.load()
    assert scorer.engine == "http vllm_generate"


@pytest.mark.parametrize("api", ["vllm_generate", "vllm_completions"])
def test_a_response_that_just_fits_the_context_is_scored_and_one_beyond_it_is_an_error_row(
    served: ServedVllm, teacher_folder: Path, api: str
) -> None:
    rows = [
        ScoreRequest(key, np.full(200, 7, np.int32), np.arange(3, 3 + size, dtype=np.int32), key)
        for key, size in enumerate([55, 56])
    ]
    found = {scores.key: scores for scores in scorer_of(served, teacher_folder, api=api).score(rows, 0)}
    assert (found[0].error, len(found[0].logprobs)) == (None, 55)
    assert found[1].error == "256 tokens and one to generate, the teacher's context is 256"


REFUSALS = {
    "other name": ({"model": "another"}, 0, r"serves 'teacher', but score.http.model = 'another'. Set one of them"),
    "other api": ({"api": "sglang"}, 0, r"/generate refused the request with status 404: Not Found"),
    "top k": ({"api": "vllm_generate"}, 30, r"status 400: Requested prompt logprobs of 30, .* max allowed: 20"),
    "top k, completions": ({"api": "vllm_completions"}, 30, r"status 400: Requested prompt logprobs of 30"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_server_cannot_do_is_refused_in_one_line(served: ServedVllm, teacher_folder: Path, name: str) -> None:
    options, top_k, message = REFUSALS[name]
    row = ScoreRequest(0, np.array([5, 6], np.int32), np.array([7, 8], np.int32), 0)
    with pytest.raises(ConfigError, match=message) as caught:
        list(scorer_of(served, teacher_folder, top_k, **options).score([row], top_k))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(served.url)


def test_a_server_that_dies_midway_is_exit_75_and_what_it_scored_stays(
    served: ServedVllm, task: Path, overrides: list[str], run_path: Path
) -> None:
    """The last one: it ends the server."""
    recipe = [str(task / "recipe.yaml"), *overrides, f"run_dir={run_path}", *by_server(served.url, concurrency=1)]
    command = opd_cache_command("score", *recipe, "--episode", "0")

    def shards() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run_path / SCORES).glob("shard-*.parquet")}

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not shards():
        time.sleep(0.002)
    served.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith(f"TryAgainError: {served.url}")
    left = shards()
    assert 0 < len(left) < 12
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 75, again.stderr
    assert again.stderr.splitlines()[-1].startswith(f"TryAgainError: {served.url}")
    assert shards() == left
    assert not (run_path / SCORES / SEAL).exists()
