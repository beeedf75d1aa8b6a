"""A teacher that is added to a finished cache: what is scored with it, and that nothing else changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_verified, complete, data_files, run_command, save_model, tiny_qwen2

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.replay import replay_run
from opd_cache.run import Run, open_run
from opd_cache.status import run_status
from opd_cache.store.query import query_rows

WEIGHTS = ("model.safetensors", "trainer/optimizer.safetensors")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that adds a second teacher."""
    folder = save_model(tiny_qwen2(seed=7, hidden_size=48), tmp_path_factory.mktemp("other") / "teacher")
    return f"teachers.other={{model: {folder}, dtype: float32, device: cpu}}"


@pytest.fixture(scope="module")
def cache(
    make_recipe: Callable[..., Recipe], task: Path, other: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[int, bytes]]]:
    """A finished run whose source of prompts is gone and to which a teacher was added afterwards, by command; and its
    rollout files as they were before."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copy(task / "train.jsonl", folder)
    settings = (f"run_dir={folder}/run", f"prompts.path={folder}/train.jsonl", "eval.path=null")
    complete(make_recipe(folder / "run", *settings))
    (folder / "train.jsonl").unlink()
    before = files(folder / "run", "*/rollouts/*")
    for episode in ("0", "1"):
        command = ["score", task / "recipe.yaml", *settings, other, "learn.teacher=main"]
        done = run_command(*command, "--episode", episode, "--teacher", "other")
        assert done.returncode == 0, done.stderr
    return folder / "run", before


def files(run: Path, pattern: str) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(run.glob(pattern))}


def test_it_scores_the_rollouts_that_are_there_without_the_source_of_the_prompts(
    cache: tuple[Path, dict[str, tuple[int, bytes]]],
) -> None:
    run, before = cache
    assert len(before) == 2 * 4
    assert files(run, "*/rollouts/*") == before
    for entry in run_status(run)["episodes"]:
        assert {name: scores["sealed"] for name, scores in entry["scores"].items()} == {"main": True, "other": True}
    notes = [path.name for path in (run / "logs/score/episode=0").iterdir()]
    assert sorted(notes) == [
        f"teacher={name}-shard-{shard:05d}.json" for name in ("main", "other") for shard in range(3)
    ]
    sql = "select teacher, count(*), count(distinct rollout_id) from scores group by teacher order by teacher"
    assert query_rows(run, sql)[1] == [("main", 48, 48), ("other", 48, 48)]
    sql = """select avg(list_distance(a.teacher_logprobs, b.teacher_logprobs)) from scores a join scores b
             using (episode, rollout_id, ids_hash) where a.teacher = 'main' and b.teacher = 'other'"""
    assert query_rows(run, sql)[1][0][0] > 0.1


def test_learning_from_the_first_teacher_gives_the_same_bits_with_and_without_the_second(
    make_recipe: Callable[..., Recipe], finished_run: Run, other: str, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))
    for folder in ("learn", "policy"):
        shutil.rmtree(path / "episode=1" / folder)
    settings = ("--episode", "1", "--teacher", "other")
    done = run_command("score", recipe_file(make_recipe, path, other), *settings)
    assert done.returncode == 0, done.stderr
    run = open_run(make_recipe(path, other, "learn.teacher=main"))
    assert learn_episode(run, 1, new_engine(run))
    found, expected = data_files(path), data_files(finished_run.dir.path)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert {name for name in found if name not in expected} == {
        f"episode=1/scores/teacher=other/{name}"
        for name in ("plan.json", "_SEALED.json", *(f"shard-{shard:05d}-of-00003.parquet" for shard in range(3)))
    }


def recipe_file(make_recipe: Callable[..., Recipe], path: Path, other: str) -> Path:
    """The recipe with both teachers as a file beside the run."""
    from opd_cache.recipes import recipe_yaml

    file = path.with_suffix(".yaml")
    file.write_text(recipe_yaml(make_recipe(path, other, "learn.teacher=main")))
    return file


def test_a_replay_learns_from_a_teacher_that_the_run_did_not_name(
    cache: tuple[Path, dict[str, tuple[int, bytes]]], tmp_path: Path
) -> None:
    run, _ = cache
    unchanged = replay_run(run, tmp_path / "unchanged", "0", [])
    assert [entry["same_weights"] for entry in unchanged["episodes"]] == [True]
    changed = replay_run(run, tmp_path / "changed", "0", ["learn.teacher=other"])
    assert [entry["same_weights"] for entry in changed["episodes"]] == [False]
    plan = json.loads((tmp_path / "changed/episode=0/learn/plan.json").read_text())
    assert plan["teacher"] == "other"
    assert (tmp_path / "changed/episode=0/scores/teacher=main/_SEALED.json").exists()
    assert_verified(tmp_path / "changed")
    again = replay_run(tmp_path / "changed", tmp_path / "again", "0", [])
    assert [entry["same_weights"] for entry in again["episodes"]] == [True]


def test_a_replay_from_a_teacher_without_scores_is_refused_with_those_that_have_some(
    cache: tuple[Path, dict[str, tuple[int, bytes]]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^learn.teacher = 'nope' is unknown. Known: main, other.$"):
        replay_run(cache[0], tmp_path / "replay", "0", ["learn.teacher=nope"])
    assert list(tmp_path.iterdir()) == []
