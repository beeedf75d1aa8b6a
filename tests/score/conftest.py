"""A tiny teacher, its log-probs by a plain log-softmax, and HTTP scorers of its servers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_model, tiny_qwen2
from served_teacher import LogprobsOf
from transformers import PreTrainedModel

from opd_cache.config import HttpOptions, ScoreConfig, TeacherConfig
from opd_cache.score.scorers.http import HTTPScorer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    module = tiny_qwen2(seed=4)
    return save_model(module, tmp_path_factory.mktemp("teacher")), module


@pytest.fixture(scope="session")
def logprobs_of(model: tuple[Path, PreTrainedModel]) -> LogprobsOf:
    """[T, V] by a plain log-softmax over full logits, one sequence at a time."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    @torch.no_grad()
    def compute(ids: list[int]) -> np.ndarray:
        if tuple(ids) not in known:
            known[tuple(ids)] = model[1](input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
        return known[tuple(ids)]

    return compute


@pytest.fixture
def scorer_of(model: tuple[Path, PreTrainedModel]) -> Callable[..., HTTPScorer]:
    """An HTTP scorer of some servers, impatient as tests are."""

    def make(*urls: str, top_k: int = 0, **options: object) -> HTTPScorer:
        quick = {"api": "auto", "concurrency": 4, "timeout_s": 5.0, "max_retries": 3, "retry_base_delay_s": 0.01}
        http = HttpOptions(urls=list(urls), **{**quick, **options})  # type: ignore[arg-type]
        return HTTPScorer(TeacherConfig(model=str(model[0])), ScoreConfig(scorer="http", top_k=top_k, http=http))

    return make
