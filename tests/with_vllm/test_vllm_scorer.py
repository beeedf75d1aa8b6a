"""The vLLM scorer against the transformers one, which is tested against a plain log-softmax."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

from opd_cache.config import ScoreConfig, TeacherConfig, VllmOptions
from opd_cache.errors import ConfigError, ModelError
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scorers.vllm import VllmScorer
from opd_cache.score.scores import UNKNOWN_RANK, Scorer, ScoreRequest, TokenScores

TOP_K = 8


def requests(num_prompts: int = 12, samples: int = 4, prompt: int = 100) -> list[ScoreRequest]:
    """Prompts of several blocks, shared by their samples; two samples of each begin alike, one is empty."""
    rng = np.random.default_rng(0)
    rows: list[ScoreRequest] = []
    for group in range(num_prompts):
        prompt_ids = rng.integers(3, 258, rng.integers(1, prompt)).astype(np.int32)
        common = rng.integers(3, 258, 70).astype(np.int32)
        for sample in range(samples):
            own = rng.integers(3, 258, rng.integers(1, 40)).astype(np.int32)
            response = {0: np.zeros(0, np.int32), 1: common, 2: np.concatenate([common, own])}.get(sample, own)
            rows.append(ScoreRequest(len(rows), prompt_ids, response, group))
    return rows


def config(folder: Path) -> TeacherConfig:
    return TeacherConfig(model=str(folder), dtype="float32", device="cpu")


def by_key(scorer: Scorer, rows: Sequence[ScoreRequest], top_k: int) -> dict[int, TokenScores]:
    found = {scores.key: scores for scores in scorer.score(rows, top_k)}
    assert sorted(found) == [row.key for row in rows]
    return found


def with_support(rows: Sequence[ScoreRequest]) -> list[ScoreRequest]:
    """The same rows, asked for three ids a token."""
    rng = np.random.default_rng(1)
    return [replace(row, support_ids=rng.integers(3, 258, (len(row.response_ids), 3)).astype(np.int32)) for row in rows]


@pytest.fixture(scope="module")
def scorer(teacher_folder: Path) -> Iterator[VllmScorer]:
    scorer = VllmScorer(config(teacher_folder), ScoreConfig(top_k=TOP_K, vllm=VllmOptions(**SMALL)))
    yield scorer
    scorer.close()


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_vllm_and_transformers_agree(scorer: VllmScorer, teacher_folder: Path, top_k: int) -> None:
    rows = requests()
    expected = by_key(HFScorer(config(teacher_folder), ScoreConfig(top_k=top_k)), rows, top_k)
    for key, found in by_key(scorer, rows, top_k).items():
        theirs = expected[key]
        assert found.error is None
        assert found.logprobs.dtype == np.float32
        assert found.topk_ids.shape == (len(rows[key].response_ids), top_k)
        np.testing.assert_allclose(found.logprobs, theirs.logprobs, atol=2e-5, rtol=0)
        np.testing.assert_allclose(found.topk_logprobs, theirs.topk_logprobs, atol=2e-5, rtol=0)
        # Two tokens that are all but equally likely may stand in either order.
        assert (found.rank == theirs.rank).mean() > 0.99 if len(found.rank) else True


def test_samples_that_begin_alike_get_the_numbers_that_they_get_alone(scorer: VllmScorer) -> None:
    """Their first response rows lie in a cached block, which the engine reads and does not compute."""
    rows = requests()
    together = by_key(scorer, rows, 0)
    for row in rows[:8]:
        (alone,) = by_key(scorer, [row], 0).values()
        np.testing.assert_allclose(together[row.key].logprobs, alone.logprobs, atol=1e-5, rtol=0)


def test_a_response_beyond_the_context_is_an_error_row_and_shifts_nothing(scorer: VllmScorer) -> None:
    rows = requests(num_prompts=2)
    fits, too_long = (
        ScoreRequest(0, np.full(200, 7, np.int32), np.arange(3, 3 + size, dtype=np.int32), 99) for size in (55, 56)
    )
    mixed = [replace(row, key=key) for key, row in enumerate([*rows[:3], too_long, fits, *rows[3:]])]
    found, alone = by_key(scorer, mixed, 0), by_key(scorer, rows, 0)
    assert found[3].error == "256 tokens and one more, the teacher's context is 256"
    assert len(found[3].logprobs) == 0
    assert len(found[4].logprobs) == 55
    for key, row in enumerate(rows):
        place = key if key < 3 else key + 2
        np.testing.assert_allclose(found[place].logprobs, alone[row.key].logprobs, atol=1e-5, rtol=0)


def test_a_token_that_the_teacher_lacks_is_an_error_row(scorer: VllmScorer) -> None:
    row = ScoreRequest(0, np.array([5], np.int32), np.array([6, 258], np.int32), 0)
    assert by_key(scorer, [row], 0)[0].error == "token id 258, the teacher has 258 embeddings"


def test_top_k_above_the_engines_cap_is_refused(teacher_folder: Path) -> None:
    options = ScoreConfig(top_k=30, vllm=VllmOptions(**SMALL, engine_args={"max_logprobs": 10}))
    with pytest.raises(ConfigError, match=r"score.top_k = 30, but the engine gives at most 10 \(max_logprobs 10, 258"):
        VllmScorer(config(teacher_folder), options).load()


def test_an_unknown_engine_argument_is_refused_in_one_line(teacher_folder: Path) -> None:
    options = ScoreConfig(vllm=VllmOptions(**SMALL, engine_args={"no_such_thing": 1}))
    with pytest.raises(ConfigError, match=r"vLLM cannot load .*no_such_thing.* Its settings are score.vllm") as caught:
        VllmScorer(config(teacher_folder), options).load()
    assert "\n" not in str(caught.value)


def test_the_array_form_of_the_gpus_model_runner_agrees_too(teacher_folder: Path) -> None:
    """Chosen ids on response rows alone, prompts shared: as on a GPU, in Triton's interpreter."""
    script = str(Path(__file__).with_name("interpreted.py"))
    ended = subprocess.run([sys.executable, script, str(teacher_folder)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["uses_token_ids"] is True
    assert found["ranks"] == [UNKNOWN_RANK]
    expected = by_key(HFScorer(config(teacher_folder), ScoreConfig()), requests(num_prompts=3), 0)
    for key, scores in expected.items():
        np.testing.assert_allclose(found["logprobs"][str(key)], scores.logprobs, atol=2e-5, rtol=0)
    on_support = by_key(HFScorer(config(teacher_folder), ScoreConfig()), with_support(requests(num_prompts=1)), 3)
    assert len(on_support) == len(found["on_support"])
    for key, scores in on_support.items():
        logprobs, topk_logprobs = found["on_support"][str(key)]
        np.testing.assert_allclose(logprobs, scores.logprobs, atol=2e-5, rtol=0)
        np.testing.assert_allclose(np.reshape(topk_logprobs, (-1, 3)), scores.topk_logprobs, atol=2e-5, rtol=0)


def test_the_first_model_runner_refuses_the_students_support(teacher_folder: Path) -> None:
    scorer = VllmScorer(config(teacher_folder), ScoreConfig(vllm=VllmOptions(**SMALL), top_k=3, support="student"))
    with pytest.raises(ConfigError, match=r"score.support = 'student' needs vLLM's second model runner") as caught:
        scorer.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [HFScorer, VllmScorer])
def test_a_model_with_code_of_its_own_is_refused_unless_the_recipe_allows_it(
    kind: type[Scorer], teacher_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    content = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps({**content, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"Set trust_remote_code=true for this model") as caught:
        kind(config(folder), ScoreConfig(vllm=VllmOptions(**SMALL))).load()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_known_model_is_loaded_without_the_code_beside_it(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    content = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps({**content, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    expected = by_key(HFScorer(config(teacher_folder), ScoreConfig()), requests(num_prompts=1), 0)
    found = by_key(VllmScorer(config(folder), ScoreConfig(vllm=VllmOptions(**SMALL))), requests(num_prompts=1), 0)
    for key, scores in expected.items():
        np.testing.assert_allclose(found[key].logprobs, scores.logprobs, atol=2e-5, rtol=0)
    assert not (tmp_path / "ran").exists()


def test_lora_adapters_without_a_model_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(teacher_folder)}))
    with pytest.raises(ModelError, match=r"holds LoRA adapters and no whole model") as caught:
        VllmScorer(config(folder), ScoreConfig(vllm=VllmOptions(**SMALL))).load()
    assert "\n" not in str(caught.value)
