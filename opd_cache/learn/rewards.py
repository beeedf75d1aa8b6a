"""Task rewards as advantages: a response's reward compared with those of the other samples of its prompt."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from opd_cache.store.join import Joined
from opd_cache.types import Rollout

# Rewards of a group that differ by less are the same reward.
SMALLEST_DEVIATION = 1e-6


def group_advantages(batch: Sequence[Joined], rows: Sequence[Joined]) -> list[float]:
    """(reward − group mean) ÷ group deviation of each of `rows`; a group is what one episode sampled for one prompt.

    The whole `batch` makes the groups, rows without a loss too. A group of equal rewards teaches nothing: 0.
    Source: GRPO (Shao et al., "DeepSeekMath", 2024), with the population's deviation.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for rollout, _ in batch:
        if rollout.reward is not None:
            groups[_group(rollout)].append(rollout.reward)
    moments = {key: (float(np.mean(values)), float(np.std(values))) for key, values in groups.items()}
    advantages = []
    for rollout, _ in rows:
        mean, std = moments.get(_group(rollout), (0.0, 0.0))
        known = rollout.reward is not None and std > SMALLEST_DEVIATION
        advantages.append((rollout.reward - mean) / std if known and rollout.reward is not None else 0.0)
    return advantages


def _group(rollout: Rollout) -> str:
    return rollout.rollout_id.rpartition("/")[0]  # its episode and its prompt


def mean_reward(batch: Sequence[Joined]) -> float | None:
    """Mean over the rollouts that have a reward; None when there is none."""
    rewards = [rollout.reward for rollout, _ in batch if rollout.reward is not None]
    return float(np.mean(rewards)) if rewards else None
