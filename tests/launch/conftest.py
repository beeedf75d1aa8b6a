"""A real Slurm of two nodes on this machine, where Debian's packages of it are installed."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import run_command
from slurm_cluster import PATH_OF_DAEMONS, PROGRAMS, TESTS, Slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH_OF_DAEMONS) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install munge slurmctld slurmd slurm-client")
    # Sockets lie in it, so its path must be short.
    folder = Path(f"/tmp/opd-cache-slurm-{os.getpid()}")
    cluster = Slurm(folder)
    cluster.sandbox("start")
    yield cluster
    cluster.sandbox("stop")
    shutil.rmtree(folder)


@pytest.fixture
def same_run_here(task: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run of the shared task by `opd-cache run` on this machine, with these settings."""

    def make(*settings: str) -> Path:
        folder = tmp_path / "here"
        # Jobs find the tests' own samplers in the same way.
        environment = os.environ | {"PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
        recipe = str(task / "recipe.yaml")
        ended = run_command("run", recipe, f"run_dir={folder}", *settings, env=environment)
        assert ended.returncode == 0, ended.stderr
        return folder

    return make
