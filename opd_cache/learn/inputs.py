"""What an episode learns from: sealed rollouts and scores, checked against each other and against the recipe."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from opd_cache.config import Recipe
from opd_cache.errors import MismatchError, MissingInputError
from opd_cache.learn.losses import Loss
from opd_cache.learn.stream import Source
from opd_cache.run import Run
from opd_cache.run_dir import PLAN
from opd_cache.store.join import Joined
from opd_cache.store.plans import RolloutPlan, load_rollout_plan, rollout_shards, score_shards, stage_command


def open_sources(run: Run, episode: int, loss: Loss) -> tuple[list[Source], list[dict[str, object]]]:
    """The episode's rollouts with their scores, and those of the older episodes that it replays, oldest last; and what
    the plan says of each.

    Raises MissingInputError when some are not complete, MismatchError when they belong to other inputs than those that
    are there, or lack what the loss needs.
    """
    first = max(0, episode - run.recipe.learn.replay_episodes)
    opened = [_open_source(run, number, loss, is_own=number == episode) for number in range(episode, first - 1, -1)]
    return [source for source, _ in opened], [facts for _, facts in opened]


def _open_source(run: Run, episode: int, loss: Loss, is_own: bool) -> tuple[Source, dict[str, object]]:
    target, teacher = run.dir.episode(episode), run.recipe.learning_teacher()
    for path, stage in ((target.plan, "rollout"), (target.scores(teacher) / PLAN, "score")):
        if not path.exists():
            raise MissingInputError(f"{path}: not there. Run: {stage_command(stage, target)}")
    plan = load_rollout_plan(target)
    rollouts, scores = rollout_shards(target, plan), score_shards(target, plan, teacher)
    rollouts_seal, scores_seal = rollouts.open_seal(), scores.open_seal()
    if scores.about["rollouts"] != rollouts_seal:
        raise MismatchError(
            f"{scores.folder}: the scores were made from other rollouts than {rollouts.folder} now holds. Move the folder away and run: {scores.remedy}"
        )
    if is_own and not run.is_replay and plan.policy != (found := run.policy_fingerprint(episode)):
        raise MismatchError(
            f"{target.plan}: sampled by policy {plan.policy[:12]}, but the policy of version {episode} is {found[:12]}. Move {target.path} away and run: {rollouts.remedy}"
        )
    check_needs(run.recipe, loss, plan, scores.about["top_k"], str(scores.folder))
    facts = {"episode": episode, "policy": plan.policy, "rollouts": rollouts_seal, "scores": scores_seal}
    return Source(episode, rollouts, scores, plan.num_rollouts, plan.n_samples_per_prompt), facts


def check_needs(recipe: Recipe, loss: Loss, plan: RolloutPlan, top_k: int, scores: str) -> None:
    """Refuse a loss that needs what the cache does not have. Raises MismatchError."""
    name = recipe.learn.loss.name
    if loss.needs_topk and not top_k:
        raise MismatchError(
            f"learn.loss.name = {name!r} needs the teacher's top k, but {scores} was scored with score.top_k=0. Use reverse_kl_pg, or score again with score.top_k=8 in another run_dir."
        )
    if loss.needs_reward and plan.reward is None:
        raise MismatchError(
            f"learn.loss.name = {name!r} needs task rewards, but the rollouts of episode {plan.scope} carry none. Set rollout.reward=exact_match for a new run_dir, or leave reward_pg out of the loss."
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
