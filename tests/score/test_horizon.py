"""Scores of the first tokens of a response alone, and of the rest later: as if all had been scored at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import assert_verified, data_files

from opd_cache.config import Recipe
from opd_cache.errors import AlignmentError, MismatchError, MissingInputError, OpdCacheError
from opd_cache.learn.batch import micro_batches, rows_to_learn
from opd_cache.learn.inputs import open_source
from opd_cache.learn.losses import REVERSE_KL_TOPK
from opd_cache.learn.stage import learn_episode, new_engine
from opd_cache.learn.stream import planned_rows
from opd_cache.pipeline import InlineStages
from opd_cache.replay import replay_run
from opd_cache.run import Run, open_run
from opd_cache.stage import Share
from opd_cache.status import run_status, scored_parts
from opd_cache.store.plans import load_rollout_plan, score_shards
from opd_cache.store.query import query_rows
from opd_cache.store.rows import score_batch
from opd_cache.types import Rollout, Score


@pytest.fixture
def unscored(finished_run: Run, make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    """A run whose first episode is sampled, opened with these settings; the same folder at every call."""
    leave = shutil.ignore_patterns("learn", "policy", "episode=1", "evals", "scores", "logs")
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "run", ignore=leave))
    return lambda *settings: open_run(make_recipe(path, *settings))


def score(run: Run) -> Run:
    assert InlineStages(run).score(0)
    return run


def rows(run: Run) -> list[tuple[Rollout, Score]]:
    source, _ = open_source(run.recipe, run.dir.episode(0), 0, REVERSE_KL_TOPK)
    return list(planned_rows([source], epochs=1, cursor=0))


def learned(run: Run) -> list[dict]:
    assert learn_episode(run, 0, new_engine(run))
    return pq.read_table(run.dir.steps(0)).to_pylist()


def refused(kind: type[OpdCacheError], run: Run) -> str:
    before = sorted(run.dir.path.rglob("*"))
    with pytest.raises(kind) as caught:
        InlineStages(run).score(0)
    assert "\n" not in str(caught.value)
    assert sorted(run.dir.path.rglob("*")) == before
    return str(caught.value)


def assert_same_scores(found: Score, expected: Score) -> None:
    """The same but for the rounding of other batch shapes."""
    assert (found.rollout_id, found.ids_hash, found.error) == (expected.rollout_id, expected.ids_hash, expected.error)
    np.testing.assert_allclose(found.teacher_logprobs, expected.teacher_logprobs, atol=1e-4)
    np.testing.assert_array_equal(found.teacher_rank, expected.teacher_rank)
    np.testing.assert_array_equal(found.topk_ids, expected.topk_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=1e-4)


def test_only_the_first_tokens_are_scored_and_learned(unscored: Callable[..., Run], finished_run: Run) -> None:
    run, whole = score(unscored("score.horizon=4")), rows(finished_run)
    for (rollout, found), (same, expected) in zip(rows(run), whole, strict=True):
        assert rollout.rollout_id == same.rollout_id
        assert len(rollout.response_ids) == len(expected.teacher_logprobs)
        assert len(found.teacher_logprobs) == min(4, len(rollout.response_ids))
        np.testing.assert_allclose(found.teacher_logprobs, expected.teacher_logprobs[:4], atol=1e-4)
        assert found.topk_ids.tolist() == expected.topk_ids[:4].tolist()
    assert any(len(rollout.response_ids) > 4 for rollout, _ in whole)
    steps = learned(run)
    assert sum(row["tokens"] for row in steps) == sum(min(4, len(rollout.response_ids)) for rollout, _ in whole)
    lengths = [len(rollout.response_ids) for rollout, _ in whole]
    assert sum(row["response_length"] * row["rollouts"] for row in steps) == pytest.approx(sum(lengths))
    stored = pq.read_table(run.dir.episode(0).scores("main") / "shard-00000-of-00003.parquet").to_pylist()
    assert all(row["num_response_tokens"] == len(row["teacher_logprobs"]) <= 4 for row in stored)


def test_a_token_without_a_score_is_no_target(unscored: Callable[..., Run]) -> None:
    """The learner's tensors hold the scored tokens alone, with the prompts and targets of the whole responses."""
    joined = rows(score(unscored("score.horizon=3")))
    kept = rows_to_learn(joined, mask_truncated=False)
    for batch in micro_batches(kept, [0.0] * len(kept), max_tokens=10**6):
        order = [rollout for rollout, _ in sorted(kept, key=lambda row: -row[0].num_tokens)]
        assert sorted(batch.target_ids_N.tolist()) == sorted(
            token for rollout in order for token in rollout.response_ids.tolist()
        )
        assert len(batch.teacher_logprobs_N) == len(batch.sampling_logprobs_N) == len(batch.target_ids_N)
    by_id = {rollout.rollout_id: rollout for rollout, _ in joined}
    for rollout, found in kept:
        assert rollout.response_ids.tolist() == by_id[rollout.rollout_id].response_ids.tolist()[:3]
        assert len(rollout.sampling_logprobs) == len(found.teacher_logprobs) > 0


@pytest.mark.parametrize("horizons", [[4, None], [2, 3, 9, None], [1, 12]])
def test_scoring_the_rest_later_gives_what_scoring_at_once_gives(
    unscored: Callable[..., Run], finished_run: Run, horizons: list[int | None]
) -> None:
    before: dict[str, bytes] = {}
    for horizon in horizons:
        run = score(unscored(f"score.horizon={'null' if horizon is None else horizon}"))
        now = data_files(run.dir.path)
        assert {name: now[name] for name in before} == before  # what was there is not made again
        before = now
    assert scored_parts(run.dir.episode(0), "main") == [0, *(first for first in horizons[:-1])]
    for (rollout, found), (_, expected) in zip(rows(run), rows(finished_run), strict=True):
        assert len(found.teacher_logprobs) == len(rollout.response_ids)
        assert_same_scores(found, expected)
    again = score(unscored(f"score.horizon={'null' if horizons[-1] is None else horizons[-1]}"))
    assert data_files(again.dir.path) == before


def test_learning_from_parts_is_learning_from_the_whole(unscored: Callable[..., Run], finished_run: Run) -> None:
    score(unscored("score.horizon=5"))
    steps = learned(run := score(unscored()))
    expected = pq.read_table(finished_run.dir.steps(0)).to_pylist()
    for found, row in zip(steps, expected, strict=True):
        assert found["tokens"] == row["tokens"]
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-4)
    plan = json.loads((run.dir.learn(0) / "plan.json").read_text())
    assert set(plan["sources"][0]["scores"]) == {"teacher=main", "teacher=main,from=5"}


def test_a_horizon_that_no_response_reaches_gives_the_same_bits(
    unscored: Callable[..., Run], finished_run: Run
) -> None:
    learned(run := score(unscored("score.horizon=99")))
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert (run.policy_folder(1) / name).read_bytes() == (finished_run.policy_folder(1) / name).read_bytes()


def test_status_query_and_replay_know_the_parts(unscored: Callable[..., Run], tmp_path: Path) -> None:
    score(unscored("score.horizon=4"))
    learned(run := score(unscored()))
    (entry,) = run_status(run.dir.path)["episodes"]
    assert {name: part["sealed"] for name, part in entry["scores"].items()} == {"main": True, "main,from=4": True}
    assert sum(part["tokens"] for part in entry["scores"].values()) == entry["rollouts"]["tokens"]
    sql = """select rollout_id, sum(s.num_response_tokens) = any_value(r.num_response_tokens),
             list(first_token order by first_token) from scores s join rollouts r using (episode, rollout_id)
             where teacher = 'main' group by rollout_id"""
    found = query_rows(run.dir.path, sql)[1]
    assert len(found) == 24
    assert all(is_whole and firsts == [0, 4] for _, is_whole, firsts in found)
    (compared,) = replay_run(run.dir.path, tmp_path / "replay", None, [])["episodes"]
    assert compared["same_weights"] is True
    assert (tmp_path / "replay/episode=0/scores/teacher=main,from=4/_SEALED.json").exists()
    assert_verified(run.dir.path)
    assert_verified(tmp_path / "replay")


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ("4", "3", "the first 4 tokens of the responses are scored, score.horizon = 3 is fewer. Set score.horizon=4; "),
        ("null", "3", "all tokens of the responses are scored, score.horizon = 3 is fewer. Set score.horizon=null; "),
    ],
)
def test_a_smaller_horizon_is_refused(unscored: Callable[..., Run], first: str, then: str, said: str) -> None:
    run = score(unscored(f"score.horizon={first}"))
    path = run.dir.episode(0).scores("main") / "plan.json"
    message = refused(MismatchError, unscored(f"score.horizon={then}"))
    assert message == f"{path}: {said}scores are never cut."


def test_the_rest_waits_until_the_first_tokens_are_sealed(unscored: Callable[..., Run]) -> None:
    run = unscored("score.horizon=4")
    assert not InlineStages(run).score(0, share=Share(shard=1))
    message = refused(MissingInputError, unscored("score.horizon=8"))
    folder = run.dir.episode(0).scores("main")
    assert message == (
        f"{folder}: not complete with score.horizon = 4, which comes before score.horizon = 8. "
        "Run: opd-cache score RECIPE --episode 0 --teacher main score.horizon=4"
    )


def test_the_rest_by_another_teacher_or_with_other_settings_is_refused(unscored: Callable[..., Run]) -> None:
    score(unscored("score.horizon=4"))
    message = refused(MismatchError, unscored("score.top_k=2"))
    assert "teacher=main/plan.json: the first tokens were scored with top_k = 4, now 2. Set it back, or move" in message


def test_a_rest_that_is_asked_for_and_not_complete_is_not_learned_without(unscored: Callable[..., Run]) -> None:
    score(unscored("score.horizon=4"))
    run = unscored()
    assert not InlineStages(run).score(0, share=Share(shard=0))
    with pytest.raises(
        MissingInputError, match=r"teacher=main,from=4: 1 of 3 shards are there and no _SEALED.json. Run"
    ):
        learn_episode(run, 0, new_engine(run))
    assert not run.dir.learn(0).exists()


@pytest.mark.parametrize("horizon", ["null", "4"])
def test_a_list_of_another_length_than_the_plan_says_is_refused(unscored: Callable[..., Run], horizon: str) -> None:
    """Cut by one token more than the horizon cuts, and published as if it were right."""
    run = score(unscored(f"score.horizon={horizon}"))
    target = run.dir.episode(0)
    shards = score_shards(target, load_rollout_plan(target), "main")
    kept = [found for _, found in rows(run)][:8]
    longest = max(range(8), key=lambda row: len(kept[row].teacher_logprobs))
    for name in ("teacher_logprobs", "teacher_rank", "topk_ids", "topk_logprobs"):
        object.__setattr__(kept[longest], name, getattr(kept[longest], name)[:-1])
    (target.scores("main") / "_SEALED.json").unlink()
    shards.path(0).unlink()
    shards.publish(0, lambda: [score_batch(kept, shards.schema)])
    assert shards.seal()
    with pytest.raises(AlignmentError, match=rf"row {longest}: teacher_logprobs has \d+ values, response_ids has \d+"):
        rows(run)


def test_a_row_that_cannot_be_scored_in_full_has_an_error_as_a_whole(
    finished_run: Run, unscored: Callable[..., Run], tmp_path: Path
) -> None:
    """With the first tokens scored and the rest beyond the teacher's context, as when all were scored at once."""
    template = f"teachers.main.prompt.template='{{prompt}}{'x' * 44}'"
    score(unscored("score.horizon=1", template))
    assert all(found.error is None for _, found in rows(unscored("score.horizon=1", template)))
    joined = rows(score(unscored(template)))
    failed = [found for _, found in joined if found.error is not None]
    assert 0 < len(failed) < len(joined)
    for found in failed:
        assert found.error.endswith("tokens, the teacher's context is 64")
        assert found.topk_ids.shape == (0, 4)
        assert len(found.teacher_logprobs) == len(found.teacher_rank) == 0
