"""The score stage: for every missing shard, give each rollout its teacher's log-probs and publish them beside it."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opd_cache import registry
from opd_cache.config import TeacherConfig
from opd_cache.errors import MismatchError, MissingInputError, StoreError
from opd_cache.fingerprint import fingerprint_model, model_folder, num_embeddings
from opd_cache.logs import StageProgress
from opd_cache.prompts.intake import read_prompt_ids
from opd_cache.prompts.teacher_prompts import check_teacher_prompts, publish_teacher_prompts
from opd_cache.run import Run, check_same_vocabulary, eos_ids, load_tokenizer, read_vocabulary
from opd_cache.run_dir import PLAN, SEAL, RolloutSet
from opd_cache.score.scores import Scorer, ScoreRequest
from opd_cache.stage import EVERYTHING, Share, make_shards
from opd_cache.status import scored_parts
from opd_cache.store.join import read_rollouts, score_fault
from opd_cache.store.plans import (
    RolloutPlan,
    load_rollout_plan,
    publish_score_plan,
    rollout_shards,
    score_shards,
    stage_command,
)
from opd_cache.store.publish import digest_file, read_json
from opd_cache.store.rows import ROWS_PER_GROUP, ROWS_PER_GROUP_TOPK, group_sizes, score_batch
from opd_cache.store.shards import ShardSet
from opd_cache.types import Int32Array, Rollout, Score

log = logging.getLogger(__name__)


def new_scorer(run: Run, config: TeacherConfig) -> Scorer:
    """The scorer of a teacher, as `Run.teacher_config` gives it, without a model yet."""
    name = config.scorer or run.recipe.score.scorer
    return registry.load(registry.SCORERS, name, "score.scorer")(config, run.recipe.score)


def teachers_to_score(run: Run) -> list[str]:
    """The teachers that the recipe wants scores of."""
    chosen = run.recipe.score.teacher
    return [chosen] if chosen is not None else list(run.recipe.teachers)


def score_episode(run: Run, episode: int, teacher: str, scorer: Scorer, share: Share = EVERYTHING) -> bool:
    """Score an episode's missing shards with one teacher; True when the stage is sealed.

    Raises MissingInputError when the rollouts are not complete, MismatchError when the teacher was asked for
    something else before, ModelError when its vocabulary is another.
    """
    options = run.recipe.score
    return score_rollouts(run, run.dir.episode(episode), teacher, scorer, options.top_k, share, options.horizon)


def score_rollouts(
    run: Run,
    target: RolloutSet,
    teacher: str,
    scorer: Scorer,
    top_k: int,
    share: Share = EVERYTHING,
    horizon: int | None = None,
) -> bool:
    """Make the missing score shards of one plan's rollouts, of the tokens up to `horizon` that have no score yet."""
    if not target.plan.exists():
        raise MissingInputError(f"{target.path}: no rollouts yet. Run: {stage_command('rollout', target)}")
    plan = load_rollout_plan(target)
    rollouts = rollout_shards(target, plan)
    seal = rollouts.open_seal()
    config = run.teacher_config(teacher, plan.policy_version)
    fingerprint = fingerprint_model(model_folder(config))
    if run.recipe.teachers[teacher].policy == "current" and fingerprint != plan.policy:
        raise MismatchError(
            f"{target.plan}: sampled by policy {plan.policy[:12]}, but policy version {plan.policy_version} of this run is {fingerprint[:12]}; teachers.{teacher}.model = 'policy:current' means the one that sampled. Name a model folder instead."
        )
    first_token = _first_token_to_score(target, teacher, horizon)
    prompts = _own_prompts(run, target, plan, teacher, config)
    facts = {
        "teacher": teacher,
        "teacher_fingerprint": fingerprint,
        "scorer": config.scorer or run.recipe.score.scorer,
        "dtype": scorer.dtype,
        "top_k": top_k,
        "rollouts": seal,
        "teacher_prompts": None if prompts is None else digest_file(prompts),
        "first_token": first_token or None,
        "horizon": horizon,
    }
    publish_score_plan(target, plan, facts)
    scores = score_shards(target, plan, teacher, first_token)
    if share.of(scores.missing()):
        check_same_vocabulary(read_vocabulary(run.dir), config, teacher)
        _warn_of_other_eos(plan, teacher, config)
        scorer.load()

    def make(shard: int, progress: StageProgress) -> Iterator[pa.RecordBatch]:
        own_ids = {} if prompts is None else read_prompt_ids(prompts, plan.shard_prompts(shard))
        return _score_shard(plan, rollouts, scores, shard, own_ids, scorer, progress)

    return make_shards(
        "score",
        run.dir,
        target,
        plan,
        scores,
        share,
        make,
        {"engine": scorer.engine, "dtype": scorer.dtype, "teacher": teacher},
    )


def _first_token_to_score(target: RolloutSet, teacher: str, horizon: int | None) -> int:
    """0, or behind sealed scores of fewer tokens the first one that they lack. Raises MismatchError when they have more
    than the horizon, MissingInputError when they are not complete."""
    parts = scored_parts(target, teacher)
    if not parts:
        return 0
    folder = target.scores(teacher, parts[-1])
    reach = read_json(folder / PLAN).get("horizon")
    if reach == horizon:
        return parts[-1]
    wanted = "null" if horizon is None else horizon
    if reach is None or (horizon is not None and horizon < reach):
        scored = "all tokens" if reach is None else f"the first {reach} tokens"
        raise MismatchError(
            f"{folder / PLAN}: {scored} of the responses are scored, score.horizon = {wanted} is fewer. Set score.horizon={'null' if reach is None else reach}; scores are never cut."
        )
    if not (folder / SEAL).exists():
        raise MissingInputError(
            f"{folder}: not complete with score.horizon = {reach}, which comes before score.horizon = {wanted}. Run: {stage_command('score', target, teacher)} score.horizon={reach}"
        )
    return int(reach)


def _own_prompts(run: Run, target: RolloutSet, plan: RolloutPlan, teacher: str, config: TeacherConfig) -> Path | None:
    """The prompts as the teacher sees them, made on first use; None where it sees the student's ids."""
    if config.prompt.template is None:
        return None
    final = target.teacher_prompts(teacher)
    if not final.exists():
        check_same_vocabulary(read_vocabulary(run.dir), config, teacher)
        tokenizer, embeddings = load_tokenizer(config), num_embeddings(model_folder(config))
        publish_teacher_prompts(teacher, config.prompt, tokenizer, embeddings, target.prompts, plan.prompts, final)
    check_teacher_prompts(teacher, config.prompt, plan.prompts, final)
    return final


def _warn_of_other_eos(plan: RolloutPlan, teacher: str, config: TeacherConfig) -> None:
    theirs = eos_ids(model_folder(config))
    if theirs and not set(theirs) & set(plan.sampling.stop_token_ids):
        log.warning(
            "score   teacher %s ends its responses with token %s, the student with %s: the teacher will find the student's EOS unlikely. Set rollout.stop_token_ids where they mean the same.",
            teacher,
            theirs,
            plan.sampling.stop_token_ids,
        )


def _score_shard(
    plan: RolloutPlan,
    rollouts: ShardSet,
    scores: ShardSet,
    shard: int,
    own_ids: Mapping[int, Int32Array],
    scorer: Scorer,
    progress: StageProgress,
) -> Iterator[pa.RecordBatch]:
    """Score window after window of whole prompt groups, row groups leaving in the order of the rollouts.

    own_ids: the teacher's own prompts by prompt_index; empty where it sees the student's.
    """
    limit = ROWS_PER_GROUP_TOPK if scores.about["top_k"] else ROWS_PER_GROUP
    reader = read_rollouts(rollouts, shard)
    for window in group_sizes(plan.shard_rollouts(shard), plan.n_samples_per_prompt, max(limit, scorer.window)):
        scored = _score_window(list(islice(reader, window)), window, own_ids, scorer, scores.about, progress)
        start = 0
        for size in group_sizes(window, plan.n_samples_per_prompt, limit):
            yield score_batch(scored[start : start + size], scores.schema)
            start += size


def _score_window(
    rows: list[Rollout],
    expected: int,
    own_ids: Mapping[int, Int32Array],
    scorer: Scorer,
    about: Mapping[str, Any],
    progress: StageProgress,
) -> list[Score]:
    top_k = about["top_k"]
    requests = [
        _request(key, row, own_ids.get(row.prompt_index, row.prompt_ids), about) for key, row in enumerate(rows)
    ]
    found: dict[int, Score] = {}
    for scores in scorer.score(requests, top_k):
        row = rows[scores.key]
        score = Score(
            row.rollout_id,
            row.ids_hash,
            scores.logprobs,
            scores.rank,
            scores.topk_ids,
            scores.topk_logprobs,
            scores.error,
        )
        if fault := score_fault(row, score, about):
            raise StoreError(
                f"the scorer ({scorer.engine}, {scorer.dtype}) gave {score.rollout_id}: {fault}; nothing was published."
            )
        found[scores.key] = score
        progress.advance(1, len(scores.logprobs))
    if len(found) != expected:
        raise StoreError(
            f"{len(rows)} rollouts were read and {len(found)} scored ({scorer.engine}), expected {expected}; nothing was published."
        )
    return [found[key] for key in range(expected)]


def _request(key: int, row: Rollout, prompt_ids: Int32Array, about: Mapping[str, Any]) -> ScoreRequest:
    """The tokens of a response that are to be scored. Those before them stand behind the prompt."""
    first, horizon = about.get("first_token"), about.get("horizon")
    if first is None:
        return ScoreRequest(key, prompt_ids, row.response_ids[:horizon], row.prompt_index)
    seen = np.concatenate([prompt_ids, row.response_ids[:first]])
    return ScoreRequest(key, seen, row.response_ids[first:horizon], group=key)
