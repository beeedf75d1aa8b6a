"""The servers of the score tests, and a finished run that may be changed."""

import shutil
import sys
from pathlib import Path

import pytest

from opd_cache.run import Run

sys.path.append(str(Path(__file__).parent.parent / "score"))


@pytest.fixture
def run_path(finished_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.dir.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def shared_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For many examples: whoever changes a file puts it back."""
    return Path(shutil.copytree(finished_run.dir.path, tmp_path_factory.mktemp("shared") / "run"))
