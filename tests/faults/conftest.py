"""The log of all faults, for tools/fault_table.py (FAULT_LOG names its folder), and stages to interfere with."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_client import FaultServer, build_shim
from fault_log import FaultLog
from stages import TINY, Stages

MEMORY = Path("/dev/shm")  # where fsync costs nothing and the calls are the same


@pytest.fixture(scope="session")
def faults() -> FaultLog:
    folder = os.environ.get("FAULT_LOG")
    return FaultLog(Path(folder) if folder else None)


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
