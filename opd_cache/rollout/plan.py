"""Which prompts an episode uses, and in which order: a pure function of the run's seed and the episode's number."""

from typing import Any

import numpy as np

from opd_cache.config import EvalConfig, Recipe
from opd_cache.errors import ConfigError
from opd_cache.store.plans import RolloutPlan, SamplingPlan
from opd_cache.types import derive_seed


def episode_prompts(seed: int, episode: int, num_prompts: int, prompts_per_episode: int) -> list[int]:
    """The prompts of one episode, shuffled.

    An epoch is one permutation of all prompts, cut into whole episodes; its ragged rest waits for the next epoch, so
    that no episode holds a prompt twice.
    """
    if prompts_per_episode > num_prompts:
        raise ConfigError(
            f"rollout.prompts_per_episode = {prompts_per_episode}, but there are only {num_prompts} prompts."
        )
    epoch, place = divmod(episode, num_prompts // prompts_per_episode)
    order = np.random.Generator(np.random.PCG64(derive_seed(seed, "prompt-order", epoch))).permutation(num_prompts)
    return order[place * prompts_per_episode : (place + 1) * prompts_per_episode].tolist()


def plan_episode(
    recipe: Recipe,
    run_id: str,
    episode: int,
    policy_version: int,
    policy: str,
    dtype: str,
    prompts_digest: str,
    num_prompts: int,
    stop_token_ids: list[int],
) -> RolloutPlan:
    """The plan of an episode's rollouts by that policy."""
    options = recipe.rollout
    return RolloutPlan(
        run_id=run_id,
        scope=str(episode),
        seed=recipe.seed,
        policy_version=policy_version,
        policy=policy,
        sampler=options.sampler,
        dtype=dtype,
        prompts=prompts_digest,
        prompt_indices=episode_prompts(recipe.seed, episode, num_prompts, options.prompts_per_episode),
        n_samples_per_prompt=options.n_samples_per_prompt,
        prompts_per_shard=options.prompts_per_shard,
        sampling=SamplingPlan(
            options.temperature,
            options.top_p,
            options.top_k,
            options.max_new_tokens,
            stop_token_ids,
            options.student_top_k,
        ),
        reward=None if options.reward is None else _reward_facts(options.reward, recipe.eval),
    )


def _reward_facts(name: str, options: EvalConfig) -> dict[str, Any]:
    """What a reward follows from. Answers are found as evaluations find them."""
    return {
        "name": name,
        "answer_pattern": options.answer_pattern,
        "reference_pattern": options.reference_pattern,
    }
