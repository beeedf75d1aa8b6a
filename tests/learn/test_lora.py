"""LoRA: only adapters are trained, and what is published is a model that every other stage can load."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers import complete
from safetensors.torch import load_file

from opd_cache.config import ModelConfig, Recipe
from opd_cache.learn.lora import adapters_off, is_adapter
from opd_cache.learn.stage import new_engine
from opd_cache.models import load_model
from opd_cache.run import Run

LORA = ("learn.lora.rank=4", "learn.kl_coef=0.1", "eval.path=null", "learn.learning_rate=1e-2")


@pytest.fixture(scope="module", params=[True, False], ids=["merged", "adapter"])
def run(
    request: pytest.FixtureRequest, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    path = tmp_path_factory.mktemp("lora") / "run"
    return complete(make_recipe(path, *LORA, f"learn.lora.merge={str(request.param).lower()}"))


def test_only_adapters_are_trained_and_saved_with_their_optimizer(run: Run) -> None:
    engine = new_engine(run)
    engine.load(run.policy_folder(2), with_optimizer=True)
    trained = {name for name, parameter in engine.student.module.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(is_adapter(name) for name in trained)
    state = load_file(run.policy_folder(2) / "trainer/optimizer.safetensors")
    assert {label.partition(":")[2] for label in state} == trained
    initial = load_file(run.policy_folder(0) / "model.safetensors")
    for name, tensor in engine.student.module.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if plain in initial:
            assert torch.equal(tensor, initial[plain]), name


def test_the_published_policy_computes_what_the_engine_does(run: Run) -> None:
    engine = new_engine(run)
    engine.load(run.policy_folder(2), with_optimizer=False)
    student = engine.student.model
    published = load_model(ModelConfig(str(run.policy_folder(2)), device="cpu"), "student")
    initial = load_model(ModelConfig(str(run.policy_folder(0)), device="cpu"), "student")
    ids = torch.arange(70, 90)[None]
    with torch.no_grad():
        logits = {
            "engine": student.logits(student.hidden(ids, None)[0]),
            "published": published.logits(published.hidden(ids, None)[0]),
            "initial": initial.logits(initial.hidden(ids, None)[0]),
        }
        with adapters_off(student.module):
            off = student.logits(student.hidden(ids, None)[0])
    torch.testing.assert_close(logits["published"], logits["engine"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(off, logits["initial"], atol=1e-5, rtol=1e-5)
    assert (logits["engine"] - logits["initial"]).abs().max() > 0.01


def test_the_next_episode_is_on_policy_and_the_penalty_is_against_the_initial_student(run: Run) -> None:
    first, second = (pq.read_table(run.dir.steps(episode)).to_pylist() for episode in range(2))
    assert first[0]["kl_penalty"] == pytest.approx(0, abs=1e-8)
    assert first[-1]["kl_penalty"] > 0
    # The sampler loaded the published policy, the learner went on with its adapters: the same model.
    assert second[0]["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert second[0]["kl_penalty"] > 0


def test_a_fresh_process_goes_on_with_the_same_adapters(
    run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Both episodes in one warm engine, or the second in a new one: the same weights."""
    import shutil

    from opd_cache.learn.stage import learn_episode
    from opd_cache.run import open_run

    path = Path(shutil.copytree(run.dir.path, tmp_path / "run"))
    shutil.rmtree(path / "episode=1/policy")
    shutil.rmtree(path / "episode=1/learn")
    merge = str(run.recipe.learn.lora.merge).lower()
    again = open_run(make_recipe(path, *LORA, f"learn.lora.merge={merge}"))
    assert learn_episode(again, 1, new_engine(again))
    for file in run.policy_folder(2).rglob("*.safetensors"):
        assert (path / "episode=1/policy" / file.relative_to(run.policy_folder(2))).read_bytes() == file.read_bytes()
