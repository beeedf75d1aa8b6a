"""Task rewards: a number for each response, computed when it is sampled and stored beside it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from opd_cache import registry
from opd_cache.config import ModelConfig
from opd_cache.config.values import shown
from opd_cache.errors import ConfigError, StoreError
from opd_cache.grade import response_of
from opd_cache.run import load_tokenizer
from opd_cache.types import Prompt, Rollout

LARGEST = float(np.finfo(np.float32).max)

RolloutReward = Callable[[Rollout, Prompt], float | None]


def new_reward(facts: dict[str, Any] | None, student: ModelConfig) -> RolloutReward | None:
    """The reward that a plan names, as a function of a rollout and its prompt; None when it names none.

    Raises ConfigError when there is no such function. What it gives is a float32 value; it raises StoreError where the
    function gives something else than a finite number or None.
    """
    if facts is None:
        return None
    name, patterns = facts["name"], (facts["answer_pattern"], facts["reference_pattern"])
    function = registry.load(registry.REWARDS, name, "rollout.reward")
    if not callable(function):
        raise ConfigError(f"rollout.reward = {name!r} is a {type(function).__name__}, expected a function.")
    tokenizer = load_tokenizer(student)

    def reward(rollout: Rollout, prompt: Prompt) -> float | None:
        value = function(response_of(rollout, prompt, tokenizer, *patterns))
        # NaN fails every comparison, and float32 makes an infinity of what is larger.
        is_number = isinstance(value, int | float | np.integer | np.floating) and -LARGEST <= value <= LARGEST
        if value is not None and not is_number:
            raise StoreError(
                f"rollout.reward = {name!r} gave {shown(value)} for {rollout.rollout_id}, expected a finite number or None; nothing was published. Mend the function and run the same command again."
            )
        return None if value is None else float(np.float32(value))

    return reward
