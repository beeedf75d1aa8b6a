"""The learn stage around its steps: signals, kept checkpoints, loggers, epochs, and the inputs that it refuses."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import edit_json

from opd_cache.config import Recipe
from opd_cache.errors import (
    AlignmentError,
    ConfigError,
    CorruptShardError,
    MismatchError,
    MissingInputError,
    TryAgainError,
)
from opd_cache.learn import stage
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.learn.step import Trainer
from opd_cache.run import Run, open_run
from opd_cache.stop import noted_signals
from opd_cache.store.publish import read_json


@pytest.fixture
def unlearned(finished_run: Run, tmp_path: Path) -> Path:
    """A run whose second episode is sampled and scored, but not learned."""
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))
    for folder in ("learn", "policy"):
        shutil.rmtree(path / "episode=1" / folder)
    return path


def learn(make_recipe: Callable[..., Recipe], path: Path, *settings: str) -> Run:
    run = open_run(make_recipe(path, *settings))
    assert learn_episode(run, 1, new_engine(run))
    return run


def rewritten(path: Path, change: Callable[[dict[str, list]], None]) -> None:
    """The shard with other values and whole again: its page checksums, schema, footer and the seal's size are right."""
    with pq.ParquetFile(path) as file:
        footer, schema = file.metadata.metadata[b"opd_cache"], file.schema_arrow
        columns = file.read().to_pydict()
    change(columns)
    with pq.ParquetWriter(path, schema, write_page_checksum=True, use_dictionary=False) as writer:
        writer.write_table(pa.table(columns, schema=schema))
        writer.add_key_value_metadata({"opd_cache": footer})
    seal_path = path.with_name("_SEALED.json")
    shards = read_json(seal_path)["shards"]
    for entry in shards:
        if entry["file"] == path.name:
            entry["bytes"] = path.stat().st_size
    edit_json(seal_path, shards=shards)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_to_go_on_from(
    finished_run: Run, make_recipe: Callable[..., Recipe], unlearned: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Signalled(Trainer):
        def step(self, *arguments, **options):  # type: ignore[no-untyped-def]
            os.kill(os.getpid(), number)
            return super().step(*arguments, **options)

    before = signal.getsignal(number)
    monkeypatch.setattr(stage, "Trainer", Signalled)
    name = signal.Signals(number).name
    with pytest.raises(
        TryAgainError, match=rf"stopped by {name} after step 1 of 3 of episode 1; a checkpoint is there"
    ):
        learn(make_recipe, unlearned)
    assert signal.getsignal(number) == before
    assert [folder.name for folder in unlearned.glob("episode=1/learn/checkpoint-*")] == ["checkpoint-000001"]
    monkeypatch.setattr(stage, "Trainer", Trainer)
    run = learn(make_recipe, unlearned)
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert (run.policy_folder(2) / name).read_bytes() == (finished_run.policy_folder(2) / name).read_bytes()
    assert not list(unlearned.glob("episode=1/learn/checkpoint-*"))


def test_a_signal_in_the_last_step_is_left_to_who_waits_for_the_policy(
    make_recipe: Callable[..., Recipe], unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run must not go on with its next stage."""

    class Signalled(Trainer):
        def step(self, batch, step, *arguments):  # type: ignore[no-untyped-def]
            if step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().step(batch, step, *arguments)

    monkeypatch.setattr(stage, "Trainer", Signalled)
    with noted_signals() as request:
        run = learn(make_recipe, unlearned)
        assert request.signal_name == "SIGUSR1"
        request.signal_name = None
    assert run.is_learned(1)
    assert (unlearned / "logs/learn/episode=1/learn.json").exists()


def test_checkpoints_are_kept_as_the_recipe_says(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    settings = ["learn.train_batch_size=4", "learn.checkpoint_every_steps=1", "learn.keep_every=2", "learn.keep_last=2"]
    learn(make_recipe, unlearned, *settings)
    found = sorted(folder.name for folder in unlearned.glob("episode=1/learn/checkpoint-*"))
    assert found == ["checkpoint-000002", "checkpoint-000004"]


def test_epochs_and_updates_set_the_number_of_steps(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    run = learn(make_recipe, unlearned, "learn.epochs_per_episode=2", "learn.updates_per_episode=4")
    rows = pq.read_table(run.dir.steps(1)).to_pylist()
    assert [row["rollouts"] for row in rows] == [12] * 4
    assert [row["step"] for row in rows] == [4, 5, 6, 7]
    assert rows[0]["ess"] == pytest.approx(1, abs=1e-4)
    assert rows[-1]["ess"] < 0.9999  # the second epoch is off-policy


def test_replayed_episodes_count_as_stale(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    run = learn(make_recipe, unlearned, "learn.replay_episodes=3")
    rows = pq.read_table(run.dir.steps(1)).to_pylist()
    assert sum(row["rollouts"] for row in rows) == 48
    assert sum(row["staleness"] * row["rollouts"] for row in rows) == pytest.approx(24)


def test_metrics_go_to_tensorboard_and_to_wandb_without_a_network(
    make_recipe: Callable[..., Recipe], unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = learn(make_recipe, unlearned, "learn.loggers=[tensorboard, wandb]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unlearned / "logs/tensorboard"))
    events.Reload()
    rows = pq.read_table(run.dir.steps(1)).to_pylist()
    logged = events.Scalars("learn/reverse_kl")
    assert [(event.step, event.value) for event in logged] == [
        (row["step"], pytest.approx(row["reverse_kl"])) for row in rows
    ]
    assert list(unlearned.glob("logs/wandb/offline-run-*/*.wandb"))


def test_an_unknown_logger_is_refused(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn.loggers\[0\] = 'mlflow' is unknown. Known: tensorboard, wandb"):
        make_recipe(unlearned, "learn.loggers=[mlflow]")


def test_an_engine_that_cannot_be_imported_says_why(
    make_recipe: Callable[..., Recipe], unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    run = open_run(make_recipe(unlearned, "learn.engine=deepspeed"))
    expected = r"^learn.engine = 'deepspeed', but deepspeed cannot be imported \(.*deepspeed.*\)\. Run: pip install"
    with pytest.raises(ConfigError, match=expected):
        learn_episode(run, 1, new_engine(run))


def refused(kind: type[Exception], make_recipe: Callable[..., Recipe], path: Path, *settings: str) -> str:
    with pytest.raises(kind) as caught:
        learn(make_recipe, path, *settings)
    assert not (path / "episode=1/policy").exists()
    assert not list(path.rglob("*.tmp"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scores_of_other_rollouts_are_refused(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    shard = unlearned / "episode=1/scores/teacher=main/shard-00000-of-00003.parquet"
    rewritten(shard, lambda columns: columns["ids_hash"].reverse())
    message = refused(AlignmentError, make_recipe, unlearned)
    assert message.startswith(f"{shard} row 0: scores other token ids, expected 1/")


def test_a_missing_seal_is_refused(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    (unlearned / "episode=1/scores/teacher=main/_SEALED.json").unlink()
    message = refused(MissingInputError, make_recipe, unlearned)
    assert "3 of 3 shards are there and no _SEALED.json. Run: opd-cache score RECIPE --episode 1" in message
    assert not (unlearned / "episode=1/learn").exists()


def test_a_teachers_id_beyond_the_students_vocabulary_is_refused_or_counts_as_tail(
    make_recipe: Callable[..., Recipe], unlearned: Path
) -> None:
    def change(columns: dict[str, list]) -> None:
        columns["topk_ids"][2][3] = 258

    rewritten(unlearned / "episode=1/scores/teacher=main/shard-00001-of-00003.parquet", change)
    message = refused(MismatchError, make_recipe, unlearned)
    assert "the teacher's top k holds token id 258, the student has 258 embeddings." in message
    shutil.rmtree(unlearned / "episode=1/learn")
    run = learn(make_recipe, unlearned, "learn.loss.teacher_only_ids=tail")
    assert all(np.isfinite(row["loss"]) for row in pq.read_table(run.dir.steps(1)).to_pylist())


@pytest.mark.parametrize("column", ["teacher_logprobs", "topk_logprobs"])
def test_nan_in_a_column_is_refused(make_recipe: Callable[..., Recipe], unlearned: Path, column: str) -> None:
    def change(columns: dict[str, list]) -> None:
        columns[column][1][0] = float("nan")

    shard = unlearned / "episode=1/scores/teacher=main/shard-00001-of-00003.parquet"
    rewritten(shard, change)
    message = refused(CorruptShardError, make_recipe, unlearned)
    assert message.startswith(f"{shard} row 1: {column} holds NaN")


def test_a_top_k_loss_on_a_cache_without_top_k_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from opd_cache.pipeline import InlineStages

    run = open_run(make_recipe(tmp_path / "run", "score.top_k=0"))
    stages = InlineStages(run)
    stages.rollout(0)
    stages.score(0)
    with pytest.raises(MismatchError, match=r"learn.loss.name = 'reverse_kl_topk' needs the teacher's top k"):
        stages.learn(0)
    assert not (tmp_path / "run/episode=0/learn").exists()


def test_a_checkpoint_of_another_plan_is_refused(make_recipe: Callable[..., Recipe], unlearned: Path) -> None:
    learn(make_recipe, unlearned, "learn.keep_every=1", "learn.learning_rate=0.5")
    shutil.rmtree(unlearned / "episode=1/policy")
    (unlearned / "episode=1/learn/plan.json").unlink()
    message = refused(MismatchError, make_recipe, unlearned)
    assert "checkpoint-000002: the checkpoint was made for another plan" in message


IMPORTED = """
import sys
from opd_cache.cli import main
sys.argv = ["opd-cache", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *sorted({"torch", "deepspeed"} & set(sys.modules)), file=sys.stderr)
"""


def test_the_torch_engine_imports_no_deepspeed(task: Path, unlearned: Path) -> None:
    """transformers does when it saves a model, for half a second of every episode's learning."""
    command = [sys.executable, "-c", IMPORTED, "learn", f"{task}/recipe.yaml", f"run_dir={unlearned}", "--episode", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: torch"
    assert (unlearned / "episode=1" / "policy").is_dir()
