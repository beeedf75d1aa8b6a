"""The rollout stage: for every missing shard, sample the responses of its prompts and publish them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from opd_cache import registry
from opd_cache.config import ModelConfig
from opd_cache.errors import StoreError
from opd_cache.health.figures import rollout_figures
from opd_cache.logs import StageProgress
from opd_cache.prompts.intake import count_prompts, read_prompts
from opd_cache.rollout.plan import plan_episode
from opd_cache.rollout.rewards import RolloutReward, new_reward
from opd_cache.rollout.samples import Sample, Sampler, SampleRequest
from opd_cache.run import Run, stop_token_ids
from opd_cache.run_dir import RolloutSet
from opd_cache.stage import EVERYTHING, Figures, Share, make_shards
from opd_cache.stall import phase
from opd_cache.store.join import rollout_fault
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, publish_rollout_plan, rollout_shards
from opd_cache.store.rows import group_limit, group_sizes, rollout_batch
from opd_cache.store.shards import ShardSet
from opd_cache.types import Prompt, Rollout, derive_seed


def new_sampler(run: Run, model: ModelConfig) -> Sampler:
    """The recipe's sampler for models like this one, without weights yet."""
    options = run.recipe.rollout
    return registry.load(registry.SAMPLERS, options.sampler, "rollout.sampler")(model, options)


def rollout_episode(run: Run, episode: int, sampler: Sampler, share: Share = EVERYTHING) -> bool:
    """Sample an episode's missing shards; True when the stage is sealed.

    Raises MissingInputError when the policy is not there yet, MismatchError when the recipe no longer says what the
    episode was planned with, StoreError on a reward that is no number.
    """
    target = run.dir.episode(episode)
    if target.plan.exists():
        shards = rollout_shards(target, load_rollout_plan(target))
        if shards.is_sealed():
            share.check(shards)
            return True
    version = run.recipe.sampling_version(episode)
    folder = run.policy_folder(version)
    plan = plan_episode(
        run.recipe,
        run.run_id,
        episode,
        version,
        run.policy_fingerprint(version),
        sampler.dtype,
        run.prompts_digest,
        count_prompts(run.dir.prompts),
        stop_token_ids(run.recipe, folder),
    )
    # A reward that cannot be loaded is refused before the plan fixes its name.
    reward = new_reward(plan.reward, run.recipe.student)
    publish_rollout_plan(target, plan, f"Set it back, or move {target.path} away to sample the episode again.")

    def load() -> None:
        run.check_policy(version)
        sampler.load_policy(run.policy_config(version))

    return sample_shards(run, target, plan, run.dir.prompts, sampler, load, share, reward)


def sample_shards(
    run: Run,
    target: RolloutSet,
    plan: RolloutPlan,
    prompts_path: Path,
    sampler: Sampler,
    load: Callable[[], None],
    share: Share = EVERYTHING,
    reward: RolloutReward | None = None,
) -> bool:
    """Make the missing rollout shards of a plan. `load` gives the sampler its weights and is called only when needed."""
    shards = rollout_shards(target, plan)
    if share.of(shards.missing()):
        with phase("loading the policy"):
            load()

    def make(shard: int, progress: StageProgress, figures: Figures) -> Iterator[pa.RecordBatch]:
        rollouts = _sample_shard(plan, shard, prompts_path, sampler, progress, reward)
        return _row_groups(rollouts, plan, shards, figures)

    return make_shards("rollout", run.dir, target, plan, shards, share, make, {"engine": sampler.engine})


def _sample_shard(
    plan: RolloutPlan,
    shard: int,
    prompts_path: Path,
    sampler: Sampler,
    progress: StageProgress,
    reward: RolloutReward | None,
) -> list[Rollout]:
    indices = plan.shard_prompts(shard)
    prompts = read_prompts(prompts_path, indices)
    order = [(prompts[index], sample) for index in indices for sample in range(plan.n_samples_per_prompt)]
    requests = [
        SampleRequest(key, prompt.prompt_ids, derive_seed(plan.seed, plan.scope, prompt.prompt_index, sample))
        for key, (prompt, sample) in enumerate(order)
    ]
    rollouts: dict[int, Rollout] = {}
    for sampled in sampler.sample(requests, plan.sampling):
        prompt, sample_index = order[sampled.key]
        rollout = _rollout(plan, prompt, sample_index, sampled)
        if fault := rollout_fault(rollout, plan.sampling.student_top_k):
            raise StoreError(
                f"the sampler ({sampler.engine}) made {rollout.rollout_id}: {fault}; nothing was published."
            )
        rollouts[sampled.key] = rollout if reward is None else replace(rollout, reward=reward(rollout, prompt))
        progress.advance(1, len(sampled.response_ids))
    if len(rollouts) != len(order):
        raise StoreError(
            f"the sampler ({sampler.engine}) gave {len(rollouts)} responses for {len(order)} requests; nothing was published."
        )
    return [rollouts[key] for key in range(len(order))]


def _rollout(plan: RolloutPlan, prompt: Prompt, sample_index: int, sampled: Sample) -> Rollout:
    return Rollout(
        rollout_id=f"{plan.scope}/{prompt.prompt_index}/{sample_index}",
        prompt_index=prompt.prompt_index,
        sample_index=sample_index,
        prompt_ids=prompt.prompt_ids,
        response_ids=sampled.response_ids,
        sampling_logprobs=sampled.sampling_logprobs,
        raw_logprobs=sampled.raw_logprobs,
        finish_reason=sampled.finish_reason,
        policy_version=plan.policy_version,
        topk_ids=sampled.topk_ids,
        topk_logprobs=sampled.topk_logprobs,
    )


def _row_groups(
    rollouts: list[Rollout], plan: RolloutPlan, shards: ShardSet, figures: Figures
) -> Iterator[pa.RecordBatch]:
    start, limit = 0, group_limit(plan.sampling.max_new_tokens * max(plan.sampling.student_top_k, 1))
    for size in group_sizes(len(rollouts), plan.n_samples_per_prompt, limit):
        group = rollouts[start : start + size]
        figures.update(rollout_figures(group))
        yield rollout_batch(group, shards.schema)
        start += size
