"""What an episode learns from: sealed rollouts and scores, checked against each other and against the recipe."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError, MissingInputError
from opd_cache.learn.dropped import drop_condition
from opd_cache.learn.losses import Loss
from opd_cache.learn.stream import Source, planned_rows
from opd_cache.learn.teachers import Teaching, teaching_of
from opd_cache.prompts.intake import read_fields
from opd_cache.run import Run
from opd_cache.run_dir import PLAN, RolloutSet
from opd_cache.store.join import Joined
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_parts, stage_command
from opd_cache.store.publish import digest_file
from opd_cache.store.shards import ShardSet


def open_sources(run: Run, episode: int, loss: Loss) -> tuple[list[Source], list[dict[str, object]]]:
    """The episode's rollouts with their scores, and those of the older episodes that it replays, oldest last; and what
    the plan says of each.

    Raises MissingInputError when some are not complete, MismatchError when they belong to other inputs than those that
    are there, or lack what the loss needs, ConfigError when a row has no teacher or learn.drop_where is no condition.
    """
    first = max(0, episode - run.recipe.learn.replay_episodes)
    opened = [
        open_source(run.recipe, run.dir.episode(number), number, loss) for number in range(episode, first - 1, -1)
    ]
    if not run.is_replay:
        _check_sampled_by(run, episode, opened[0][0].rollouts.about)
    return [source for source, _ in opened], [facts for _, facts in opened]


def _check_sampled_by(run: Run, episode: int, about: Mapping[str, Any]) -> None:
    """Refuse rollouts of another policy than the one that the recipe wants, as it is now. Raises MismatchError."""
    if "imported" in about:  # by whom is known to whoever imported them
        return
    target, wanted, version = run.dir.episode(episode), run.recipe.sampling_version(episode), about["policy_version"]
    again = f"move {target.path} away and run: {stage_command('rollout', target)}"
    if version != wanted:
        raise MismatchError(
            f"{target.plan}: sampled by policy version {version}, pipeline.lookahead = {run.recipe.pipeline.lookahead} wants version {wanted}. Set it back, or {again}"
        )
    if about["policy"] != (found := run.policy_fingerprint(wanted)):
        raise MismatchError(
            f"{target.plan}: sampled by policy {about['policy'][:12]}, but the policy of version {wanted} is {found[:12]}. M{again[1:]}"
        )


def open_source(recipe: Recipe, target: RolloutSet, episode: int, loss: Loss) -> tuple[Source, dict[str, object]]:
    """An episode's rollouts with the scores that the recipe learns from, and what the plan says of them."""
    check_asked_for(target, recipe.learning_teachers())
    plan = load_rollout_plan(target)
    rollouts = rollout_shards(target, plan)
    seal = rollouts.open_seal()
    scores = {name: open_scores(target, plan, seal, name) for name in recipe.learning_teachers()}
    check_needs(recipe, loss, plan, [parts[0] for parts in scores.values()])
    source = Source(
        episode,
        rollouts,
        tuple(scores.values()),
        plan.num_rollouts,
        plan.n_samples_per_prompt,
        open_teaching(recipe, target, plan, loss.needs_topk),
        target.prompts,
        recipe.learn.drop_where,
    )
    _check_rows(source, loss)
    seals = {shards.folder.name: digest_file(shards.seal_path) for parts in source.scores for shards in parts}
    only = next(iter(seals.values()))
    facts = {"episode": episode, "policy": plan.policy, "rollouts": seal, "scores": only if len(seals) == 1 else seals}
    return source, facts


def check_asked_for(target: RolloutSet, teachers: Sequence[str]) -> None:
    """Refuse an episode whose rollouts, or whose scores by one of these teachers, nobody asked for yet."""
    plans = [(target.plan, "rollout"), *((target.scores(name) / PLAN, "score") for name in teachers)]
    for path, stage in plans:
        if not path.exists():
            raise MissingInputError(f"{path}: not there. Run: {stage_command(stage, target)}")


def open_scores(target: RolloutSet, plan: RolloutPlan, rollouts_seal: str, teacher: str) -> tuple[ShardSet, ...]:
    """One teacher's sealed scores of these rollouts, all parts that were asked for.

    Raises MissingInputError, MismatchError, CorruptShardError.
    """
    parts = score_parts(target, plan, teacher)
    for scores in parts:
        scores.open_seal()
        if scores.about["rollouts"] != rollouts_seal:
            raise MismatchError(
                f"{scores.folder}: the scores were made from other rollouts than {target.rollouts} now holds. Move the folder away and run: {scores.remedy}"
            )
    return parts


def open_teaching(recipe: Recipe, target: RolloutSet, plan: RolloutPlan, needs_topk: bool) -> Teaching:
    """Whom each prompt of the plan is learned from. Raises ConfigError where a prompt has no route."""
    fields = read_fields(target.prompts, plan.prompt_indices) if recipe.learn.routes else {}
    return teaching_of(recipe, fields, needs_topk)


def _check_rows(source: Source, loss: Loss) -> None:
    """Refuse what can be told only from the rows: a drop_where that is no condition on them, top k that cannot be mixed.

    The latter reads all scores once; the first rows nearly always tell. Raises ConfigError, MismatchError.
    """
    if source.drop_where is not None:
        drop_condition(source.drop_where, source.rollouts, source.prompts)
    if source.teaching.weights and loss.needs_topk:
        for _ in planned_rows([replace(source, drop_where=None)], epochs=1, cursor=0):
            pass


def check_needs(recipe: Recipe, loss: Loss, plan: RolloutPlan, scores: Sequence[ShardSet]) -> None:
    """Refuse a loss that needs what the cache does not have. Raises MismatchError."""
    name = recipe.learn.loss.name
    widths = {shards.folder: shards.about["top_k"] for shards in scores}
    if loss.needs_topk and not all(widths.values()):
        folder = next(folder for folder, width in widths.items() if not width)
        raise MismatchError(
            f"learn.loss.name = {name!r} needs the teacher's top k, but {folder} was scored with score.top_k=0. Use reverse_kl_pg, or score again with score.top_k=8 in another run_dir."
        )
    if loss.needs_topk and len({*widths.values()}) > 1:
        listed = ", ".join(f"{folder.name} has {width}" for folder, width in widths.items())
        raise MismatchError(
            f"learn.loss.name = {name!r} needs as many top k of every teacher; {listed}. Use reverse_kl_pg, or score again with one score.top_k in another run_dir."
        )
    if plan.imported is not None:
        _check_imported(name, loss, plan)
    if loss.needs_reward and plan.reward is None:
        raise MismatchError(
            f"learn.loss.name = {name!r} needs task rewards, but the rollouts of episode {plan.scope} carry none. Set rollout.reward=exact_match for a new run_dir, or leave reward_pg out of the loss."
        )


def _check_imported(name: str, loss: Loss, plan: RolloutPlan) -> None:
    """Refuse a loss for which the outside rollouts lack something. Raises MismatchError."""
    if loss.needs_sampler and "sampling_logprobs" not in (plan.imported or {})["columns"]:
        raise MismatchError(
            f"learn.loss.name = {name!r} weighs tokens by their ratio to the sampler, but the rollouts of episode {plan.scope} were imported without sampling_logprobs. Use a loss without a ratio, such as reverse_kl_topk, or import them again with their log-probs."
        )
    if loss.needs_reward and len({*plan.prompt_indices}) < len(plan.prompt_indices):
        raise MismatchError(
            f"learn.loss.name = {name!r} compares the samples of a prompt, but the imported rollouts of episode {plan.scope} do not hold equally many of each prompt, one behind the other. Import whole groups, or leave reward_pg out of the loss."
        )


def with_known_ids(
    batches: Iterable[list[Joined]], vocab_size: int, loss: Loss, teacher_only_ids: str
) -> Iterator[list[Joined]]:
    """The batches, checked for token ids that the student has no embedding for. Raises MismatchError."""
    for batch in batches:
        if found := _first_beyond([rollout.response_ids for rollout, _ in batch], vocab_size):
            raise MismatchError(
                f"rollout {batch[found[0]][0].rollout_id}: holds token id {found[1]}, the student has {vocab_size} embeddings. The rollouts were sampled by another model; use its run_dir."
            )
        checks_teacher = loss.needs_topk and teacher_only_ids == "refuse"
        if checks_teacher and (found := _first_beyond([score.topk_ids for _, score in batch], vocab_size)):
            raise MismatchError(
                f"scores of {batch[found[0]][0].rollout_id}: the teacher's top k holds token id {found[1]}, the student has {vocab_size} embeddings. Set learn.loss.teacher_only_ids=tail to count such ids as mass outside the list."
            )
        yield batch


def _first_beyond(ids: Sequence[np.ndarray], vocab_size: int) -> tuple[int, int] | None:
    """(index, largest id) of the first of these arrays that holds an id beyond the vocabulary."""
    if not ids or np.concatenate([array.ravel() for array in ids]).max(initial=0) < vocab_size:
        return None
    largest = (int(array.max(initial=0)) for array in ids)
    return next((index, value) for index, value in enumerate(largest) if value >= vocab_size)
