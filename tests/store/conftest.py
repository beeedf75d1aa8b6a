"""One warm worker for all tests of the store."""

from collections.abc import Iterator

import pytest
from worker_client import Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("warm"))
    yield worker
    worker.close()
