"""What one learn stage does: how many steps, at which learning rates, on which inputs. Fixed before the first step."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opd_cache.config import LearnConfig, Recipe
from opd_cache.errors import ConfigError

# These change memory, speed and safety, not what is learned.
NOT_IN_THE_PLAN = (
    "engine",
    "python",
    "num_ranks",
    "deepspeed",
    "packing",
    "max_tokens_per_micro_batch",
    "liger",
    "gradient_checkpointing",
    "checkpoint_every_steps",
    "keep_last",
    "keep_every",
    "keep_policies",
    "loggers",
    "collective_timeout_s",
)
# In the plan as teachers.teaching_facts gives them.
TEACHING = ("teacher", "teachers", "mixing", "routes", "route_by", "drop_where")


@dataclass(frozen=True)
class LearnPlan:
    """The steps of one episode."""

    first_step: int  # optimizer steps of the run before this episode
    num_steps: int
    total_steps: int  # of the whole run: the schedule's length
    batch_size: int  # rollouts in a step, over all ranks
    rows_per_epoch: int

    def batch_sizes(self) -> list[int]:
        """Rows of each step; an epoch's last one may be short, and never takes rows of the next epoch."""
        steps = -(-self.rows_per_epoch // self.batch_size)
        epoch = [min(self.batch_size, self.rows_per_epoch - step * self.batch_size) for step in range(steps)]
        return epoch * (self.num_steps // max(steps, 1))

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


def plan_learning(
    recipe: Recipe, episode: int, num_rows: int, rows_per_prompt: Sequence[int], needs_groups: bool, first_step: int
) -> LearnPlan:
    """The plan of an episode that starts after `first_step` optimizer steps and learns from `num_rows` rows an epoch.

    needs_groups: a batch must hold all samples of a prompt (rows_per_prompt, of each source). Raises ConfigError.
    """
    config = recipe.learn
    size = config.train_batch_size
    if config.updates_per_episode is not None:
        size = max(1, -(-num_rows * config.epochs_per_episode // config.updates_per_episode))
    for samples in rows_per_prompt if needs_groups else ():
        if size % samples and config.updates_per_episode is None:
            raise ConfigError(
                f"learn.train_batch_size = {size} would part the {samples} samples of a prompt, whose rewards are compared with each other. Use a multiple of {samples}."
            )
        size = -(-size // samples) * samples
    per_episode = -(-num_rows // size) * config.epochs_per_episode
    later = max(0, recipe.num_episodes - episode)
    return LearnPlan(first_step, per_episode, max(1, first_step + per_episode * max(1, later)), size, num_rows)


def plan_facts(plan: LearnPlan, config: LearnConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """What learn/plan.json says."""
    settings = {key: value for key, value in asdict(config).items() if key not in (*NOT_IN_THE_PLAN, *TEACHING)}
    # At a constant rate the run's length changes nothing, and more episodes may be asked for at any time.
    total = None if config.lr_schedule == "constant" else plan.total_steps
    return {**asdict(plan), "total_steps": total, **inputs, "settings": settings}
