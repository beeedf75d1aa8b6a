"""The score stage on top of a served teacher: what it publishes, and what it does not."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from helpers import data_files, run_command
from served_teacher import LogprobsOf, ServedTeacher, always
from transformers import AutoModelForCausalLM

from opd_cache.config import Recipe, TeacherConfig
from opd_cache.errors import ConfigError, MismatchError, StoreError
from opd_cache.fingerprint import fingerprint_model
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.run_dir import SEAL
from opd_cache.store.join import join_stages
from opd_cache.store.plans import load_rollout_plan, rollout_shards, score_shards
from opd_cache.types import Rollout, Score

KEY = "sk-Secret.42_of-the+teacher"


@pytest.fixture(scope="module")
def task_logprobs(task: Path) -> LogprobsOf:
    """The task's teacher, by a plain log-softmax."""
    teacher = AutoModelForCausalLM.from_pretrained(task / "teacher", dtype=torch.float32).eval()

    @torch.no_grad()
    def compute(ids: list[int]) -> np.ndarray:
        return teacher(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return compute


def served_recipe(*urls: str) -> list[str]:
    quick = "max_retries: 2, retry_base_delay_s: 0.01, concurrency: 4"
    return ["score.scorer=http", f"score.http={{urls: {json.dumps(urls)}, {quick}}}"]


@pytest.fixture(scope="module")
def sampled(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the rollouts of episode 0. Shared: copy it."""
    run = open_run(make_recipe(tmp_path_factory.mktemp("sampled") / "run"))
    InlineStages(run).rollout(0)
    return run


@pytest.fixture
def run_path(sampled: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sampled.dir.path, tmp_path / "run"))


def scored_by(make_recipe: Callable[..., Recipe], path: Path, *overrides: str) -> bool:
    return InlineStages(open_run(make_recipe(path, *overrides))).score(0)


def scores_of(make_recipe: Callable[..., Recipe], path: Path) -> list[tuple[Rollout, Score]]:
    target = open_run(make_recipe(path)).dir.episode(0)
    plan = load_rollout_plan(target)
    return list(join_stages(rollout_shards(target, plan), score_shards(target, plan, "main")))


def test_the_score_command_seals_what_a_served_teacher_says_and_it_is_what_hf_says(
    task: Path, make_recipe: Callable[..., Recipe], run_path: Path, tmp_path: Path, task_logprobs: LogprobsOf
) -> None:
    local = Path(shutil.copytree(run_path, tmp_path / "local"))
    assert scored_by(make_recipe, local)
    # What is here of a served teacher has no weights.
    without_weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(task / "teacher", tmp_path / "teacher", ignore=without_weights)
    with ServedTeacher(task_logprobs, "sglang", key=KEY) as served:
        done = run_command(
            "score",
            str(task / "recipe.yaml"),
            f"run_dir={run_path}",
            *served_recipe(served.url),
            "score.http.api_key_env=TEACHER_KEY",
            f"teachers.main.model={folder}",
            "--episode",
            "0",
            env={**os.environ, "TEACHER_KEY": KEY},
        )
    assert done.returncode == 0, done.stderr
    assert "serves teacher (/models/teacher, version default) | api sglang | context 64" in done.stderr
    assert (run_path / "episode=0/scores/teacher=main" / SEAL).exists()
    pairs, expected = scores_of(make_recipe, run_path), scores_of(make_recipe, local)
    assert len(pairs) == len(expected) == 24
    for (rollout, found), (_, by_hf) in zip(pairs, expected, strict=True):
        assert found.ids_hash == rollout.ids_hash
        np.testing.assert_allclose(found.teacher_logprobs, by_hf.teacher_logprobs, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found.topk_logprobs, by_hf.topk_logprobs, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(found.topk_ids, by_hf.topk_ids)
        is_known = by_hf.teacher_rank <= 4  # SGLang gives no ranks: they are seen in the top 4
        np.testing.assert_array_equal(found.teacher_rank, np.where(is_known, by_hf.teacher_rank, 0))
    plan = json.loads((run_path / "episode=0/scores/teacher=main/plan.json").read_text())
    assert (plan["scorer"], plan["dtype"]) == ("http", "served")
    assert plan["teacher_fingerprint"] != fingerprint_model(task / "teacher")
    everything = b"".join(path.read_bytes() for path in run_path.rglob("*") if path.is_file())
    assert KEY.encode() not in everything
    assert KEY not in done.stderr + done.stdout
    assert b"127.0.0.1" not in b"".join(data_files(run_path).values())


def test_an_unreachable_teacher_is_exit_75_with_one_line_and_no_shard(task: Path, run_path: Path) -> None:
    done = run_command(
        "score", str(task / "recipe.yaml"), f"run_dir={run_path}", *served_recipe("http://127.0.0.1:9"), "--episode", "0"
    )  # fmt: skip
    assert done.returncode == 75
    errors = [line for line in done.stderr.splitlines() if " rests " not in line]
    assert len(errors) == 1
    assert errors[0].startswith("TryAgainError: http://127.0.0.1:9: ConnectError ")
    assert not (run_path / "episode=0" / "scores").exists()


def test_an_answer_that_stays_wrong_publishes_no_shard_and_names_the_rollouts(
    make_recipe: Callable[..., Recipe], run_path: Path, task_logprobs: LogprobsOf
) -> None:
    with ServedTeacher(task_logprobs, "sglang", fault=always("NaN")) as served:
        with pytest.raises(StoreError) as caught:
            scored_by(make_recipe, run_path, *served_recipe(served.url))
        message = str(caught.value)
    assert caught.value.exit_status == 2
    assert message.startswith("3 of 3 shards failed (0, 1, 2): 8 of 8 rollouts got no scores (http sglang): 0/")
    assert message.count("its log-prob is nan") == 3
    assert message.endswith("; .... Nothing was published.")
    assert "\n" not in message
    folder = run_path / "episode=0" / "scores" / "teacher=main"
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json"]
    # The same command goes on when the server is well again.
    with ServedTeacher(task_logprobs, "sglang") as served:
        assert scored_by(make_recipe, run_path, *served_recipe(served.url))


def test_what_is_scored_needs_no_server_any_more(
    make_recipe: Callable[..., Recipe], run_path: Path, task_logprobs: LogprobsOf
) -> None:
    with ServedTeacher(task_logprobs, "sglang") as served:
        recipe = served_recipe(served.url)
        assert scored_by(make_recipe, run_path, *recipe)
    before = data_files(run_path)
    assert scored_by(make_recipe, run_path, *recipe)  # and nobody is there
    assert data_files(run_path) == before


def test_scores_of_another_served_model_are_not_mixed_in(
    make_recipe: Callable[..., Recipe], run_path: Path, task_logprobs: LogprobsOf
) -> None:
    with (
        ServedTeacher(task_logprobs, "sglang", fault=always(*[None] * 10, "400")) as served,
        pytest.raises(ConfigError),
    ):
        scored_by(make_recipe, run_path, *served_recipe(served.url))
    assert len(list((run_path / "episode=0/scores/teacher=main").glob("shard-*"))) == 1
    with (
        ServedTeacher(task_logprobs, "sglang", root="/models/other") as served,
        pytest.raises(MismatchError, match=r"was made with teacher_fingerprint = "),
    ):
        scored_by(make_recipe, run_path, *served_recipe(served.url))


def test_teachers_have_servers_of_their_own(
    make_recipe: Callable[..., Recipe], run_path: Path, task: Path, task_logprobs: LogprobsOf
) -> None:
    with ServedTeacher(task_logprobs, "sglang") as one, ServedTeacher(task_logprobs, "vllm_generate") as other:
        recipe = make_recipe(
            run_path,
            *served_recipe(one.url),
            f"teachers.second={{model: {task}/teacher, urls: ['{other.url}']}}",
            "learn.teacher=main",
        )
        assert recipe.teachers["second"] == TeacherConfig(model=f"{task}/teacher", urls=[other.url])
        assert InlineStages(open_run(recipe)).score(0)
    assert len(one.asked) == len(other.asked) - 1 > 10  # one more to find out the dialect


def test_a_signal_ends_the_wait_for_a_slow_server(start: Callable[..., Command], run_path: Path) -> None:
    def slow(ids: list[int]) -> np.ndarray:
        time.sleep(30)
        raise AssertionError("nobody waits for this")

    with ServedTeacher(slow, "sglang") as served:
        command = start("score", *served_recipe(served.url), "--episode", "0")
        command.wait_for(lambda: served.in_flight == 4)
        command.stops(signal.SIGTERM)
    assert [path.name for path in run_path.glob("episode=0/scores/teacher=main/*")] == ["plan.json"]
