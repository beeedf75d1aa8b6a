"""What one learn stage does: how many steps, at which learning rates, on which inputs. Fixed before the first step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from opd_cache.config import LearnConfig, Recipe
from opd_cache.store.plans import RolloutPlan

# These change memory and safety, not what is learned.
NOT_IN_THE_PLAN = (
    "engine",
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "checkpoint_every_steps",
    "teacher",
)


@dataclass(frozen=True)
class LearnPlan:
    """The steps of one episode."""

    first_step: int  # optimizer steps of the run before this episode
    num_steps: int
    total_steps: int  # of the whole run: the schedule's length

    def learning_rate(self, step: int, config: LearnConfig) -> float:
        """Rate of the run's step `step`, counted from 0: linear warm-up, then the schedule down to zero."""
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        progress = step / self.total_steps
        shape = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[config.lr_schedule]
        return config.learning_rate * warmup * shape


def plan_learning(recipe: Recipe, rollouts: RolloutPlan, first_step: int) -> LearnPlan:
    """The plan of an episode that starts after `first_step` optimizer steps."""
    size = recipe.learn.train_batch_size
    per_episode = -(-rollouts.num_rollouts // size)
    later = max(0, recipe.num_episodes - rollouts.policy_version)
    return LearnPlan(first_step, per_episode, max(1, first_step + per_episode * max(1, later)))


def plan_facts(plan: LearnPlan, config: LearnConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """What learn/plan.json says."""
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_IN_THE_PLAN}
    # At a constant rate the run's length changes nothing, and more episodes may be asked for at any time.
    total = None if config.lr_schedule == "constant" else plan.total_steps
    return {**asdict(plan), "total_steps": total, **inputs, "settings": settings}
