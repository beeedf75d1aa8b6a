"""The student's own likeliest tokens, cached by the sampler, and the teacher's log-probs of exactly those."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import assert_verified
from transformers import AutoModelForCausalLM

from opd_cache.config import Recipe, ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError, CorruptShardError, MismatchError, StoreError
from opd_cache.learn.inputs import open_source
from opd_cache.learn.losses import REVERSE_KL_TOPK
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.learn.stream import planned_rows
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest, TokenScores
from opd_cache.score.stage import score_episode
from opd_cache.store.join import read_rollouts, rollout_fault
from opd_cache.store.plans import load_rollout_plan, rollout_shards
from opd_cache.store.rows import rollout_batch
from opd_cache.types import Rollout, Score

SAMPLED = ("rollout.student_top_k=6", "score.top_k=4")
ON_STUDENT = (*SAMPLED, "score.support=student")


@pytest.fixture(scope="module")
def sampled(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first episode is sampled, with the student's 6 likeliest tokens."""
    path = tmp_path_factory.mktemp("sampled") / "run"
    assert InlineStages(open_run(make_recipe(path, *SAMPLED))).rollout(0)
    return path


@pytest.fixture
def unscored(sampled: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    path = Path(shutil.copytree(sampled, tmp_path / "run"))
    return lambda *settings: open_run(make_recipe(path, *settings))


def scored(run: Run) -> Run:
    assert InlineStages(run).score(0)
    return run


def rows(run: Run) -> list[tuple[Rollout, Score]]:
    source, _ = open_source(run.recipe, run.dir.episode(0), 0, REVERSE_KL_TOPK)
    return list(planned_rows([source], epochs=1, cursor=0))


@torch.no_grad()
def plain_logprobs(folder: Path, rollout: Rollout) -> torch.Tensor:
    """[R, V] by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]])
    return model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double().log_softmax(-1)


def test_the_teacher_scores_the_tokens_that_the_student_finds_likeliest(
    unscored: Callable[..., Run], task: Path
) -> None:
    found = rows(scored(unscored(*ON_STUDENT)))
    differ = 0
    for rollout, score in found:
        np.testing.assert_array_equal(score.topk_ids, rollout.topk_ids[:, :4])
        teacher = plain_logprobs(task / "teacher", rollout)
        expected = teacher.gather(-1, torch.tensor(score.topk_ids, dtype=torch.int64))
        np.testing.assert_allclose(score.topk_logprobs, expected, atol=2e-5, rtol=0)
        differ += (teacher.topk(4).indices.numpy() != score.topk_ids).any(axis=1).sum()
        student = plain_logprobs(task / "student", rollout).topk(6)
        np.testing.assert_allclose(rollout.topk_logprobs, student.values, atol=2e-5, rtol=0)
        assert (rollout.topk_ids == student.indices.numpy()).mean() > 0.99  # near ties may swap
    assert differ > 100  # its own top k would have been another


def test_the_learner_takes_its_reverse_kl_over_the_students_support(unscored: Callable[..., Run]) -> None:
    run = scored(unscored(*ON_STUDENT))
    assert learn_episode(run, 0, new_engine(run))
    first = pq.read_table(run.dir.steps(0)).to_pylist()[0]
    expected = []
    for rollout, score in rows(run)[: first["rollouts"]]:
        for t, token in enumerate(rollout.response_ids):
            own, theirs = list(rollout.topk_logprobs[t, :4]), list(score.topk_logprobs[t])
            if token not in score.topk_ids[t]:  # the sampled token is never dropped
                own.append(rollout.sampling_logprobs[t])
                theirs.append(score.teacher_logprobs[t])
            p, q = np.exp(np.array(own, np.float64)), np.exp(np.array(theirs, np.float64))
            p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
            expected.append((p * np.log(p / q)).sum())
    # Before the first update the live student is the one that sampled.
    assert first["loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_teachers_that_share_the_students_support_can_be_mixed(unscored: Callable[..., Run], task: Path) -> None:
    second = f"teachers.second={{model: {task}/student, dtype: float32, device: cpu}}"
    settings = (*ON_STUDENT, second, "learn.teachers={main: 1, second: 3}")
    run = scored(unscored(*settings))
    for rollout, score in rows(run)[:4]:
        p = [plain_logprobs(task / name, rollout).exp().numpy() for name in ("teacher", "student")]
        mixture = np.log(0.25 * p[0] + 0.75 * p[1])
        assert {*map(frozenset, score.topk_ids.tolist())} == {*map(frozenset, rollout.topk_ids[:, :4].tolist())}
        expected = np.take_along_axis(mixture, score.topk_ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(score.topk_logprobs, expected, atol=2e-5, rtol=0)
    assert learn_episode(run, 0, new_engine(run))


def test_tokens_behind_the_horizon_are_scored_on_the_same_support(unscored: Callable[..., Run]) -> None:
    at_once = rows(scored(unscored(*ON_STUDENT)))
    run = unscored(*ON_STUDENT, "score.horizon=3")
    shutil.rmtree(run.dir.episode(0).scores("main"))
    scored(run)
    for (_, whole), (_, found) in zip(at_once, rows(scored(unscored(*ON_STUDENT))), strict=True):
        np.testing.assert_array_equal(found.topk_ids, whole.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, whole.topk_logprobs, atol=1e-4)
    assert_verified(run.dir.path)


def test_scores_on_one_support_are_not_mixed_with_the_others(unscored: Callable[..., Run]) -> None:
    scored(unscored(*SAMPLED))
    with pytest.raises(MismatchError, match=r"support"):
        InlineStages(unscored(*ON_STUDENT)).score(0)


def test_rollouts_that_hold_fewer_likeliest_tokens_are_refused(unscored: Callable[..., Run]) -> None:
    run = unscored("rollout.student_top_k=8", "score.top_k=8", "score.support=student")
    with pytest.raises(MismatchError, match=r"the rollouts hold the student's 6 likeliest tokens") as caught:
        InlineStages(run).score(0)
    assert "\n" not in str(caught.value)
    assert not run.dir.episode(0).scores("main").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("score.top_k=4",), r"needs 0 < score.top_k <= rollout.student_top_k, here 4 and 0"),
        (("rollout.student_top_k=8", "score.top_k=0"), r"here 0 and 8"),
        ((*SAMPLED, "learn.loss.name=entropy_aware"), r"takes the teacher's entropy from its own top k"),
        (
            (*SAMPLED, "score.scorer=http", "score.http.urls=[http://localhost:1]"),
            r"servers give only their own top k",
        ),
    ],
)
def test_settings_that_do_not_fit_the_students_support_are_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_recipe(tmp_path / "run", "score.support=student", *settings)


class OwnTopK(HFScorer):
    """A backend that answers with the teacher's own top k whatever it was asked."""

    def score(self, requests: list[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        return super().score([replace(request, support_ids=None) for request in requests], top_k)


def test_a_scorer_that_answers_with_another_support_publishes_nothing(unscored: Callable[..., Run]) -> None:
    run = unscored(*ON_STUDENT)
    scorer = OwnTopK(run.teacher_config("main", 0), run.recipe.score)
    with pytest.raises(StoreError, match=r"topk_ids are not the student's; nothing was published"):
        score_episode(run, 0, "main", scorer)
    assert not list(run.dir.episode(0).scores("main").glob("*.parquet"))


def test_a_teacher_without_an_embedding_of_a_listed_token_records_it(task: Path) -> None:
    teacher = TeacherConfig(model=str(task / "teacher"), dtype="float32", device="cpu")
    scorer = HFScorer(teacher, ScoreConfig(top_k=2, support="student"))
    ids = np.array([[5, 9_999]], np.int32)
    (found,) = scorer.score([ScoreRequest(0, np.array([7], np.int32), np.array([8], np.int32), 0, ids)], 2)
    assert found.error == "token id 9999, the teacher has 258 embeddings"


def test_a_list_of_another_length_is_refused_by_name() -> None:
    ids, logprobs = np.zeros((2, 3), np.int32), np.full((2, 3), -1.0, np.float32)
    row = Rollout("0/0/0", 0, 0, ids[0], ids[:, 0], logprobs[:, 0], "stop", 0, topk_ids=ids, topk_logprobs=logprobs)
    assert rollout_fault(row, 3) is None
    short = replace(row, topk_ids=ids[:1])
    assert rollout_fault(short, 3) == "student_topk_ids has 3 values, expected 3 for each of 2 response_ids"
    assert rollout_fault(replace(row, topk_logprobs=None), 3) == (
        "student_topk_logprobs has no values, expected 3 for each of 2 response_ids"
    )
    assert "holds NaN" in str(rollout_fault(replace(row, topk_logprobs=logprobs * np.nan), 3))


def test_a_damaged_list_is_found_at_its_row(unscored: Callable[..., Run]) -> None:
    run = unscored(*SAMPLED)
    target = run.dir.episode(0)
    shards = rollout_shards(target, load_rollout_plan(target))
    found = list(read_rollouts(shards, 0))
    logprobs = found[3].topk_logprobs.copy()
    logprobs[1, 2] = 0.5
    found[3] = replace(found[3], topk_logprobs=logprobs)
    shards.path(0).unlink()
    shards.publish(0, lambda: [rollout_batch(found, shards.schema)])
    with pytest.raises(CorruptShardError, match=r"row 3: student_topk_logprobs holds 0.5; a log-prob is at most 0"):
        list(read_rollouts(shards, 0))
