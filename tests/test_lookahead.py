"""pipeline.lookahead: episodes sampled by the policy before the one that they go on from."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import assert_verified, complete, data_files

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError
from opd_cache.pipeline import InlineStages
from opd_cache.run import Run, open_run
from opd_cache.status import run_status
from opd_cache.store.join import read_rollouts
from opd_cache.store.plans import load_rollout_plan, rollout_shards
from opd_cache.store.publish import read_json

OPTIONS = ("pipeline.lookahead=1", "num_episodes=3", "eval.path=null", "learn.loss.name=reverse_kl_pg")
# The policy itself teaches too: it must be the one that sampled.
OPTIONS += ("teachers.self.model=policy:current", "learn.teacher=main")


@pytest.fixture(scope="module")
def ahead(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of three episodes, one ahead. Shared."""
    return complete(make_recipe(tmp_path_factory.mktemp("ahead") / "run", *OPTIONS))


def test_overlapping_episodes_give_the_files_of_a_run(
    ahead: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Each stage on its own; an episode is sampled and scored before the one before it is learned."""
    order = [("rollout", 0), ("rollout", 1), ("score", 1), ("score", 0), ("learn", 0), ("rollout", 2), ("learn", 1)]
    for stage, episode in [*order, ("score", 2), ("learn", 2)]:
        assert getattr(InlineStages(open_run(make_recipe(tmp_path / "run", *OPTIONS))), stage)(episode)
    expected, found = data_files(ahead.dir.path), data_files(tmp_path / "run")
    assert len(expected) > 30
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_plans_and_rows_say_which_policy_sampled(ahead: Run) -> None:
    for episode, version in enumerate([0, 0, 1]):
        target = ahead.dir.episode(episode)
        plan = load_rollout_plan(target)
        assert (plan.policy_version, plan.policy) == (version, ahead.policy_fingerprint(version))
        rows = [row for shard in range(plan.num_shards) for row in read_rollouts(rollout_shards(target, plan), shard)]
        assert {row.policy_version for row in rows} == {version}
        teacher = json.loads((target.scores("self") / "plan.json").read_text())["teacher_fingerprint"]
        assert teacher == plan.policy
    assert [entry["policy_version"] for entry in run_status(ahead.dir.path)["episodes"]] == [0, 0, 1]
    assert_verified(ahead.dir.path)


def test_learning_goes_on_from_the_newest_policy_and_weighs_by_the_ratio(ahead: Run) -> None:
    for episode in range(3):
        parent = read_json(ahead.dir.policy_after(episode) / "_COMPLETE.json")["parent"]
        assert parent == ahead.policy_fingerprint(episode)
    first = [pq.read_table(ahead.dir.steps(episode)).to_pylist()[0] for episode in range(3)]
    assert [row["staleness"] for row in first] == [0, 1, 1]
    assert [row["policy_version"] for row in first] == [0, 1, 2]
    assert first[0]["ess"] == pytest.approx(1, abs=1e-4)
    assert all(row["ess"] < 0.9999 for row in first[1:])  # the student has moved since


def test_a_changed_lookahead_is_refused_in_an_episode_that_is_planned(
    ahead: Run, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = open_run(make_recipe(tmp_path / "run", *OPTIONS))
    stages = InlineStages(run)
    for stage, episode in [("rollout", 0), ("score", 0), ("learn", 0), ("rollout", 1), ("score", 1)]:
        getattr(stages, stage)(episode)
    changed = InlineStages(open_run(make_recipe(tmp_path / "run", *OPTIONS, "pipeline.lookahead=0")))
    with pytest.raises(
        MismatchError,
        match=r"sampled by policy version 0, pipeline.lookahead = 0 wants version 1. Set it back, or move",
    ):
        changed.learn(1)
    rollouts = run.dir.episode(1).rollouts
    for name in ("_SEALED.json", "shard-00001-of-00003.parquet"):
        (rollouts / name).unlink()
    with pytest.raises(MismatchError, match=r"the plan of episode 1 was made with .*policy_version = 0, now 1"):
        changed.rollout(1)
