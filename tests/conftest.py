"""Fixtures that all tests share: a tiny task, recipes on it, and one finished run."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, says on stdout that it guessed

import pytest
from commands import Command
from fault_log import FaultLog
from helpers import STOP_IDS, complete, opd_cache_command, save_model, tiny_qwen2, write_jsonl

from opd_cache.config import Recipe
from opd_cache.recipes import load_recipe
from opd_cache.run import Run

LONGEST = "test_readme.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: at the end, one of two workers would be alone with it for minutes."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def faults() -> FaultLog:
    """The log of all faults: FAULT_LOG names the folder that tools/fault_table.py reads."""
    folder = os.environ.get("FAULT_LOG")
    return FaultLog(Path(folder) if folder else None)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student/, teacher/, train.jsonl (24 prompts of different lengths), heldout.jsonl (6) and recipe.yaml."""
    folder = tmp_path_factory.mktemp("task")
    save_model(tiny_qwen2(seed=1), folder / "student")
    save_model(tiny_qwen2(seed=2, hidden_size=48), folder / "teacher")
    rng = random.Random(0)
    words = ["".join(rng.sample("abcdefghij", rng.randint(2, 9))) for _ in range(30)]
    problems = [
        {"id": f"p{i}", "prompt": f"sort {word}:", "answer": "".join(sorted(word))} for i, word in enumerate(words)
    ]
    write_jsonl(folder / "train.jsonl", problems[:24])
    write_jsonl(folder / "heldout.jsonl", problems[24:])
    (folder / "recipe.yaml").write_text(
        f"""
seed: 3
num_episodes: 2
torch_threads: 1
student: {{model: {folder}/student, dtype: float32, device: cpu}}
teachers: {{main: {{model: {folder}/teacher, dtype: float32, device: cpu}}}}
prompts: {{path: {folder}/train.jsonl}}
rollout:
  prompts_per_episode: 12
  n_samples_per_prompt: 2
  prompts_per_shard: 4
  max_new_tokens: 12
  batch_size: 8
  stop_token_ids: {STOP_IDS}
score: {{top_k: 4, max_tokens_per_batch: 128}}
learn:
  loss: {{name: reverse_kl_topk}}
  train_batch_size: 10
  max_tokens_per_micro_batch: 96
  learning_rate: 1.0e-3
eval: {{path: {folder}/heldout.jsonl, n_samples_per_prompt: 2}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def make_recipe(task: Path) -> Callable[..., Recipe]:
    """A checked Recipe for a run directory: make_recipe(path, "seed=4", ...)."""

    def make(run_dir: Path, *overrides: str) -> Recipe:
        return load_recipe([str(task / "recipe.yaml"), f"run_dir={run_dir}", *overrides])

    return make


@pytest.fixture(scope="session")
def finished_run(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of two episodes. Shared: copy it before changing anything in it."""
    return complete(make_recipe(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def start(task: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """start("rollout", "key=value", ..., VARIABLE="...") begins that command on tmp_path/run. It is ended with the test."""
    started: list[subprocess.Popen] = []

    def start(verb: str, *arguments: str, **variables: str) -> Command:
        command = opd_cache_command(verb, str(task / "recipe.yaml"), f"run_dir={tmp_path}/run", *arguments)
        places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "BEGUN": str(tmp_path / "begun"), "PYTHONPATH": places, **variables}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe))
        return Command(started[-1], tmp_path / "begun")

    yield start
    for process in started:
        process.kill()
        process.communicate()
