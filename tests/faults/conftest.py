"""Stages to interfere with, runs to damage, and commands that start at once."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "store"))  # store_helpers

from damage import link_copy
from fault_client import FaultServer, build_shim
from stages import TINY, Stages
from warm import WarmCommands
from world import open_to_all, remove

from opd_cache.config import Recipe
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.run import Run, open_run

MEMORY = Path("/dev/shm")  # where fsync costs nothing and the calls are the same


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faulty_io.so."""
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def fast_folder() -> Iterator[Path]:
    """In memory where there is room."""
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=MEMORY if has_room else None, prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def warm_up(task: Path, fast_folder: Path) -> list[str]:
    """The command that a fault server runs first; of several processes' servers each has its own folder."""
    return ["rollout", str(task / "recipe.yaml"), *TINY, f"run_dir={fast_folder}/warm", "--episode", "0"]


@pytest.fixture(scope="session")
def stages(shim: Path, task: Path, fast_folder: Path, warm_up: list[str]) -> Iterator[Stages]:
    server = FaultServer(shim, warm_up)
    yield Stages(server, task / "recipe.yaml", fast_folder)
    server.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommands]:
    """commands.run("rollout", ...): commands that start at once."""
    server = WarmCommands(tmp_path_factory.mktemp("said"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole_run(finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with the checkpoints inside its second episode. Shared: link_copy it before changing anything."""
    path = link_copy(finished_run.dir.path, tmp_path_factory.mktemp("whole") / "run")
    for name in ("policy", "learn"):
        shutil.rmtree(path / "episode=1" / name)
    run = open_run(make_recipe(path, "learn.keep_every=1"))
    assert learn_episode(run, 1, new_engine(run))
    return path


@pytest.fixture(scope="session")
def plain_run(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without its evaluations, which take the most time to make again."""
    path = link_copy(whole_run, tmp_path_factory.mktemp("plain") / "run")
    remove(path, ("evals", "eval_prompts.parquet"))
    return path


@pytest.fixture
def recipe(task: Path, tmp_path: Path) -> list[str]:
    """The recipe's arguments for a run at tmp_path/run."""
    return [str(task / "recipe.yaml"), f"run_dir={tmp_path}/run"]


@pytest.fixture(scope="session")
def reachable(task: Path, commands: WarmCommands) -> Iterator[tuple[Path, list[str]]]:
    """A finished run where every user gets to, and the recipe of any run beside it."""
    with tempfile.TemporaryDirectory(prefix="opd-cache-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(task, folder / "task")
        recipe = folder / "task/recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(task), str(folder / "task")))
        ended = commands.run("run", recipe, f"run_dir={folder}/whole")
        assert ended.status == 0, ended
        open_to_all(folder)
        yield folder, [str(recipe)]
