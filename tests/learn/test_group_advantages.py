"""Rewards as advantages: compared inside the group that one episode sampled for one prompt."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from opd_cache.config import Recipe
from opd_cache.errors import ConfigError
from opd_cache.learn.batch import rows_to_learn
from opd_cache.learn.plan import plan_learning
from opd_cache.learn.rewards import group_advantages, mean_reward
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score


def row(prompt: int, reward: float | None, episode: int = 0) -> Joined:
    ids, none = np.ones(3, np.int32), np.zeros((3, 0), np.int32)
    values = np.full(3, -0.5, np.float32)
    rollout_id = f"{episode}/{prompt}/0"
    rollout = Rollout(rollout_id, prompt, 0, ids, ids, values, "stop", 0, reward=reward)
    return rollout, Score(rollout_id, 0, values, ids, none, none.astype(np.float32))


def advantages(*rows: Joined) -> list[float]:
    return group_advantages(rows, rows)


def test_a_case_worked_by_hand() -> None:
    # 1, 0, 0, 1: mean 1/2, deviation 1/2. 0, 0, 3: mean 1, variance (1 + 1 + 4) / 3 = 2.
    rows = [row(7, 1.0), row(7, 0.0), row(7, 0.0), row(7, 1.0), row(2, 0.0), row(2, 0.0), row(2, 3.0)]
    assert advantages(*rows) == pytest.approx([1, -1, -1, 1, -1 / sqrt(2), -1 / sqrt(2), sqrt(2)])


def test_scale_and_offset_of_the_reward_do_not_matter() -> None:
    rewards = [0.0, 0.25, 1.0, 0.5]
    expected = advantages(*(row(0, value) for value in rewards))
    assert advantages(*(row(0, 40 * value - 3) for value in rewards)) == pytest.approx(expected)
    assert sum(expected) == pytest.approx(0)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    # The mean of 0.1, 0.1, 0.1 is not 0.1 in floating point.
    assert advantages(row(0, 0.1), row(0, 0.1), row(0, 0.1), row(1, 5.0)) == [0, 0, 0, 0]


def test_responses_without_a_reward_neither_learn_nor_count() -> None:
    assert advantages(row(0, 2.0), row(0, None), row(0, 4.0)) == pytest.approx([-1, 0, 1])
    assert advantages(row(0, 1.0), row(0, None), row(1, None)) == [0, 0, 0]


def test_rows_that_carry_no_loss_count_in_their_group() -> None:
    cut, unscored = row(0, 0.0), row(0, 0.0)
    batch = [
        (replace(cut[0], finish_reason="length"), cut[1]),
        (unscored[0], replace(unscored[1], error="too long")),
        row(0, 3.0),
    ]
    rows = rows_to_learn(batch, mask_truncated=True)
    assert len(rows) == 1
    assert group_advantages(batch, rows) == pytest.approx([sqrt(2)])


def test_samples_of_two_episodes_for_one_prompt_are_two_groups() -> None:
    """Also where one policy sampled both."""
    rows = [row(0, 1.0, episode=3), row(0, 9.0, episode=2), row(0, 2.0, 3), row(0, 7.0, 2)]
    assert advantages(*rows) == pytest.approx([-1, 1, 1, -1])


def test_the_mean_reward_leaves_out_what_has_none() -> None:
    assert mean_reward([row(0, 1.0), row(0, None), row(1, 4.0)]) == 2.5
    assert mean_reward([row(0, None)]) is None


@pytest.mark.parametrize(("size", "samples"), [(9, [2]), (6, [2, 4])])
def test_a_batch_size_that_parts_a_prompts_samples_is_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, size: int, samples: list[int]
) -> None:
    recipe = make_recipe(tmp_path, f"learn.train_batch_size={size}")
    with pytest.raises(ConfigError, match=rf"learn.train_batch_size = {size} would part the {samples[-1]} samples"):
        plan_learning(recipe, 0, 24, samples, needs_groups=True, first_step=0)
    assert plan_learning(recipe, 0, 24, samples, needs_groups=False, first_step=0).batch_size == size


def test_a_number_of_updates_makes_batches_of_whole_prompts(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "learn.updates_per_episode=5")
    plan = plan_learning(recipe, 0, 24, [4], needs_groups=True, first_step=0)
    assert (plan.batch_size, plan.batch_sizes()) == (8, [8, 8, 8])
