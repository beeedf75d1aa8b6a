"""Scores that cannot be right are never published: a shift, another tokenizer, numbers that do not repeat."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_cache.config import Recipe
from opd_cache.errors import EngineOutputError, MismatchError
from opd_cache.pipeline import InlineStages
from opd_cache.run import open_run
from opd_cache.score.checks import MIN_TOKENS
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest, TokenScores

# One shard of 24 rollouts, enough tokens for a mean.
SETTINGS = (
    "rollout.prompts_per_shard=12",
    "rollout.stop_token_ids=[1]",
    "score.top_k=0",
    "learn.loss.name=reverse_kl_pg",
)


class OtherScorer(HFScorer):
    """A scorer whose numbers `change` alters."""

    change: Callable[[TokenScores, int], TokenScores]
    calls = 0

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        self.calls += 1
        for scores in super().score(requests, top_k):
            yield self.change(scores, self.calls)


def scored_with(
    change: Callable[[TokenScores, int], TokenScores], make_recipe: Callable[..., Recipe], path: Path, *settings: str
) -> InlineStages:
    run = open_run(make_recipe(path, *SETTINGS, *settings))
    stages = InlineStages(run)
    stages.rollout(0)
    scorer = OtherScorer(run.recipe.teachers["main"], run.recipe.score)
    scorer.change = change  # type: ignore[method-assign]
    stages.scorers["main"] = scorer
    try:
        stages.score(0)
    finally:
        tokens = sum(len(r.response_ids) for r in rollouts(stages))
        assert tokens > MIN_TOKENS
    return stages


def rollouts(stages: InlineStages) -> list:
    from opd_cache.store.join import read_rollouts
    from opd_cache.store.plans import load_rollout_plan, rollout_shards

    target = stages.run.dir.episode(0)
    plan = load_rollout_plan(target)
    return [row for shard in range(plan.num_shards) for row in read_rollouts(rollout_shards(target, plan), shard)]


def minus(nats: float) -> Callable[[TokenScores, int], TokenScores]:
    return lambda scores, call: replace(scores, logprobs=scores.logprobs - np.float32(nats))


def test_a_teacher_that_finds_everything_unlikely_stops_with_the_likely_causes(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"nats a token less likely .*chat template.*shifted by one") as caught:
        scored_with(minus(9), make_recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("scores/*/shard-*"))
    scored_with(minus(9), make_recipe, tmp_path / "allowed", "score.max_gap=null")
    assert list((tmp_path / "allowed").rglob("scores/*/shard-*"))


def test_a_teacher_that_is_surer_of_the_samples_than_the_student_stops(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def certain(scores: TokenScores, call: int) -> TokenScores:
        return replace(scores, logprobs=np.full_like(scores.logprobs, -1e-3))

    with pytest.raises(MismatchError, match=r"nats a token more likely than the student that sampled them"):
        scored_with(certain, make_recipe, tmp_path / "run")
    assert not list(tmp_path.rglob("scores/*/shard-*"))


def test_numbers_that_do_not_repeat_are_never_published(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def drifting(scores: TokenScores, call: int) -> TokenScores:
        return replace(scores, logprobs=scores.logprobs - np.float32(0.01 * (call - 1)))

    with pytest.raises(EngineOutputError, match=r"0/\d+/0 scored again alone differs by up to 0\.01 nats"):
        scored_with(drifting, make_recipe, tmp_path / "run")
    assert not list(tmp_path.rglob("scores/*/shard-*"))
