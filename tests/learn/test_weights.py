"""How a policy's weights and optimizer come into memory and go to files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import complete
from safetensors import SafetensorError
from torch import Tensor

from opd_cache.config import Recipe
from opd_cache.learn import stage, weights
from opd_cache.learn.engines.torch import TorchEngine
from opd_cache.learn.stage import new_engine
from opd_cache.run import Run
from opd_cache.run_dir import CANARY, TRAINER

# How often Python looks for garbage while a stage's modules are imported; what it never looks at again.
IMPORTING = """
import gc, json, sys
from opd_cache.commands.running import quiet_libraries
from opd_cache.pipeline import InlineStages
from opd_cache.recipes import load_recipe
from opd_cache.run import open_run
def collections():
    return sum(generation["collections"] for generation in gc.get_stats())
quiet_libraries()
before = collections()
run = open_run(load_recipe(sys.argv[1:]))
stages = InlineStages(run)
stages.learn(0)
engine = stages.engine
found = collections() - before
engine.load(run.policy_folder(1), with_optimizer=False)
print(json.dumps([found, gc.get_freeze_count(), gc.isenabled()]))
"""


@pytest.fixture
def engine(finished_run: Run) -> TorchEngine:
    """As it stands after the first episode, with an optimizer."""
    engine = new_engine(finished_run)
    engine.load(finished_run.policy_folder(1), with_optimizer=True)
    return engine


def optimizer_state(engine: TorchEngine) -> dict[str, Tensor]:
    return dict(engine._optimizer_tensors())


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_an_optimizer_in_many_files_comes_back_whole(
    finished_run: Run, engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "OPTIMIZER_FILE_BYTES", 20_000)
    engine.save(tmp_path)
    files = sorted(path.name for path in (tmp_path / TRAINER).iterdir())
    assert len(files) > 4
    assert files[-1] == "optimizer.safetensors"
    other = new_engine(finished_run)
    other.load(tmp_path, with_optimizer=True)
    found, expected = optimizer_state(other), optimizer_state(engine)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_writer_that_fails_fails_the_policy(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "OPTIMIZER_FILE_BYTES", 20_000)
    last = weights._optimizer_file(tmp_path, 2)
    last.mkdir(parents=True)  # in the place of a file
    with pytest.raises(SafetensorError, match="Is a directory"):
        engine.save(tmp_path)


def test_nothing_that_is_trained_is_a_page_of_a_file(engine: TorchEngine, finished_run: Run) -> None:
    """An optimizer would copy it page by page, and a file that is cut would end the process."""
    folder = str(finished_run.policy_folder(1))
    assert optimizer_state(engine)
    assert folder not in mapped_files()


def test_a_canary_is_the_beginning_of_a_rollout(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CANARY_TOKENS", 2)
    run = complete(make_recipe(tmp_path / "run", "num_episodes=1", "eval.path=null"))
    canary = json.loads((run.policy_folder(1) / CANARY).read_text())
    assert len(canary["response_ids"]) == len(canary["logprobs"]) == 2


def test_what_is_imported_is_not_searched_for_garbage(task: Path, finished_run: Run) -> None:
    """It took a quarter of a process's imports. Later there is garbage again, and at the end no leak to report."""
    arguments = [f"{task}/recipe.yaml", f"run_dir={finished_run.dir.path}"]
    done = subprocess.run([sys.executable, "-c", IMPORTING, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    collections, frozen, is_enabled = json.loads(done.stdout)
    assert collections < 50  # without: some hundreds
    assert frozen > 100_000
    assert is_enabled
    assert done.stderr == ""
