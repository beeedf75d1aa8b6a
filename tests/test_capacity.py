"""What cannot fit is refused before a run is begun, with the numbers; what is likely not to fit is warned of."""

import json
import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import opd_cache_command, run_command, save_model, tiny_qwen2

from opd_cache.capacity import ALL_STAGES, check_models, open_fitting_run
from opd_cache.config import LearnConfig, Recipe
from opd_cache.config.learning import LoraOptions
from opd_cache.errors import ConfigError
from opd_cache.estimate import ModelSize, disk_parts, micro_batch_tokens, model_size
from opd_cache.fingerprint import num_parameters
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir


def on_small_disk(folder: Path, size: str, *arguments: str) -> subprocess.CompletedProcess:
    """An opd-cache command that sees a disk of this size at `folder`; the last line of its output is what is on it."""
    listed = f'mount -t tmpfs -o size={size} none {folder} && {{ "$@"; status=$?; ls {folder}; exit $status; }}'
    prefix = ["unshare", "-Urm", "sh", "-c", listed, "sh"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted in a user namespace here: {error}")
    return subprocess.run([*prefix, *opd_cache_command(*arguments)], capture_output=True, text=True, timeout=300)


def test_a_disk_that_is_certainly_too_small_is_refused_and_nothing_written(task: Path, tmp_path: Path) -> None:
    recipe = (str(task / "recipe.yaml"), f"run_dir={tmp_path}/run", "num_episodes=50")
    done = on_small_disk(tmp_path, "8m", "run", *recipe)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    size = 12 * (num_parameters(task / "student") or 0)
    assert "at least " in line
    assert f"50 of {size / 1e6:,.1f} MB" in line
    assert "8.4 MB are free" in line
    assert "learn.keep_policies.last=2" in line
    assert on_small_disk(tmp_path, "8m", "check", *recipe).returncode == 2
    kept = on_small_disk(tmp_path, "8m", "check", *recipe, "learn.keep_policies.last=2")
    assert (kept.returncode, "limits" in kept.stderr) == (0, False), kept.stderr


def test_a_disk_that_is_likely_too_small_is_warned_of(task: Path, tmp_path: Path) -> None:
    recipe = (
        str(task / "recipe.yaml"),
        f"run_dir={tmp_path}/run",
        "num_episodes=1",
        "rollout.prompts_per_episode=40000",
    )
    done = on_small_disk(tmp_path, "8m", "check", *recipe)
    assert done.returncode == 0, done.stderr
    assert "the run writes about " in done.stderr


def test_the_estimate_is_near_what_a_run_writes(finished_run: Run, make_recipe: Callable[..., Recipe]) -> None:
    path = finished_run.dir.path
    student = model_size(Path(finished_run.recipe.student.model))
    parts = {part.name: part for part in disk_parts(make_recipe(path, "num_episodes=4"), RunDir(path), student)}
    written = {
        "rollouts": [*path.glob("episode=*/rollouts/*.parquet")],
        "scores": [*path.glob("episode=*/scores/*/*.parquet")],
        "policies": [
            *path.glob("episode=*/policy/*.safetensors"),
            *path.glob("episode=*/policy/trainer/*.safetensors"),
        ],
    }
    sizes = {name: sum(file.stat().st_size for file in files) for name, files in written.items()}
    assert sizes["policies"] * 0.95 < parts["policies"].expected <= sizes["policies"]
    assert parts["policies"].least == parts["policies"].expected
    for name in ("rollouts", "scores"):
        # Shards of a few rows are mostly footer; what is estimated is what grows.
        assert 0 < parts[name].least < parts[name].expected < sizes[name]
    assert "the mean of this run so far" in parts["rollouts"].how


def test_contexts_are_compared_with_the_longest_prompt(
    task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"the longest prompt, 15 tokens, and .* = 60 exceed the student's context of 64"
    ):
        open_fitting_run(make_recipe(tmp_path / "long", "rollout.max_new_tokens=60"), ("rollout",))
    short = save_model(tiny_qwen2(seed=2, hidden_size=48, max_position_embeddings=20), tmp_path / "short")
    recipe = make_recipe(tmp_path / "run", f"teachers.main.model={short}")
    (warning,) = check_models(open_run(recipe), ALL_STAGES)
    assert "exceed the context of teacher 'main', 20: longer rows get an error" in warning
    assert check_models(open_run(recipe), ("rollout", "learn")) == []
    blind = save_model(tiny_qwen2(seed=2, hidden_size=48, max_position_embeddings=4), tmp_path / "blind")
    with pytest.raises(ConfigError, match="it could score no response"):
        open_fitting_run(make_recipe(tmp_path / "run", f"teachers.main.model={blind}"), ALL_STAGES)


def test_vocabularies_are_compared_at_the_start(task: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for key, who in (("score.top_k", "teacher 'main'"), ("rollout.student_top_k", "the student")):
        with pytest.raises(ConfigError, match=f"{key} = 300, but {who} has only 258 tokens"):
            open_fitting_run(make_recipe(tmp_path / "run", f"{key}=300"), ALL_STAGES)
    wide = save_model(tiny_qwen2(seed=1, vocab_size=264), tmp_path / "wide")
    (warning,) = check_models(open_run(make_recipe(tmp_path / "wider", f"student.model={wide}")), ALL_STAGES)
    assert "the student has 264 token ids, teacher 'main' has 258" in warning


def test_a_micro_batch_that_is_left_open_takes_a_share_of_the_memory_that_training_takes() -> None:
    small, third_b, seven_b = (
        ModelSize(parameters, layers, hidden, 151936, 128)
        for parameters, layers, hidden in ((1_000_000, 4, 128), (360_000_000, 32, 960), (7_600_000_000, 28, 3584))
    )
    learn = LearnConfig()
    assert micro_batch_tokens(learn, small) == 8192
    assert micro_batch_tokens(learn, third_b) == 1024  # never fewer
    assert micro_batch_tokens(learn, third_b, gpu_bytes=80 << 30) == (10 << 30) // (4 * 26 * 32 * 960)
    tokens = micro_batch_tokens(learn, seven_b)
    assert tokens == 7_600_000_000 * 16 // 3 // (4 * 26 * 28 * 3584)
    assert micro_batch_tokens(learn, seven_b, ranks=2) == tokens // 2
    assert micro_batch_tokens(replace(learn, gradient_checkpointing="selective"), seven_b) - 2 * tokens in (0, 1)
    assert micro_batch_tokens(LearnConfig(lora=LoraOptions(rank=8)), seven_b) < tokens  # nothing but weights to hold
    assert micro_batch_tokens(replace(learn, max_tokens_per_micro_batch=7), third_b, gpu_bytes=80 << 30) == 7
    assert micro_batch_tokens(learn, None) == 1024


def test_memory_is_warned_of_and_check_writes_nothing(task: Path, tmp_path: Path) -> None:
    recipe = (str(task / "recipe.yaml"), f"run_dir={tmp_path}/run", "learn.max_tokens_per_micro_batch=1000000000")
    done = run_command("check", *recipe, "--json", env={**os.environ})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["stage"] for one in found["memory"]] == ["rollout", "score main", "learn"]
    (warning,) = found["warnings"]
    assert warning.startswith("learn: about ")
    assert "lower learn.max_tokens_per_micro_batch" in warning
    assert list(tmp_path.iterdir()) == []
    shown = run_command("check", *recipe)
    assert "warning: learn: about " in shown.stdout


def test_a_run_that_fits_is_opened_without_a_word(
    make_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_fitting_run(make_recipe(tmp_path / "run"), ALL_STAGES).dir.run_json.exists()
    assert caplog.records == []
