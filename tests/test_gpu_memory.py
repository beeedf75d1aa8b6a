"""A GPU without room for a batch or a model: one line that says what to lower, or to come again. What CUDA raises is raised
here in real models on the CPU; test_gpu.py fills a GPU's memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import STOP_IDS

from opd_cache.config import ModelConfig, Recipe, RolloutConfig, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.pipeline import InlineStages
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import SampleRequest
from opd_cache.run import open_run
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest
from opd_cache.shortage import shortage
from opd_cache.store.plans import SamplingPlan

CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB."
IDS = np.arange(3, 9, dtype=np.int32)


def fill(module: Any) -> None:
    """Let the module run out of memory whenever it is called."""

    def raise_it(*arguments: object) -> None:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    module.register_forward_pre_hook(raise_it)


def test_a_scoring_batch_that_does_not_fit_names_its_key(task: Path) -> None:
    scorer = HFScorer(TeacherConfig(model=str(task / "teacher"), device="cpu"), ScoreConfig(max_tokens_per_batch=128))
    fill(scorer.model.body)
    with pytest.raises(ConfigError, match=r"^out of GPU memory with score.max_tokens_per_batch = 128; lower it\."):
        list(scorer.score([ScoreRequest(0, IDS, IDS, 0)], 0))


def test_a_sampling_batch_that_does_not_fit_names_its_key(task: Path) -> None:
    student = ModelConfig(model=str(task / "student"), device="cpu")
    sampler = HFSampler(student, RolloutConfig(batch_size=8))
    sampler.load_policy(student)
    assert sampler.model is not None
    fill(sampler.model.body)
    plan = SamplingPlan(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=4, stop_token_ids=STOP_IDS)
    with pytest.raises(ConfigError, match=r"^out of GPU memory with rollout.batch_size = 8; lower it\."):
        list(sampler.sample([SampleRequest(0, IDS, seed=1)], plan))


def test_a_micro_batch_that_does_not_fit_names_its_key(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = open_run(make_recipe(tmp_path / "run"))
    stages = InlineStages(run)
    assert stages.rollout(0)
    assert stages.score(0)
    engine: Any = new_engine(run)
    engine.load(run.policy_folder(0), with_optimizer=False)
    fill(engine.student)
    with pytest.raises(ConfigError, match=r"^out of GPU memory with learn.max_tokens_per_micro_batch = 96; lower it\."):
        learn_episode(run, 0, engine)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), RuntimeError("CUDA error: out of memory")])
def test_a_model_that_does_not_fit_is_a_lack_of_the_machine(error: Exception) -> None:
    assert shortage(error) == "out of GPU memory"
