"""The score stage: for every missing shard, give each rollout its teacher's log-probs and publish them beside it."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from opd_cache import registry
from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import MismatchError, MissingInputError, StoreError
from opd_cache.fingerprint import model_folder
from opd_cache.health.figures import score_figures
from opd_cache.logs import StageProgress
from opd_cache.prompts.intake import read_prompt_ids
from opd_cache.run import Run, check_same_vocabulary, eos_ids, read_vocabulary
from opd_cache.run_dir import RolloutSet
from opd_cache.score.checks import check_gap, check_repeats
from opd_cache.score.inputs import fingerprint_of, own_prompts
from opd_cache.score.scores import Scorer, ScoreRequest, TokenScores, UnfitScoresError
from opd_cache.stage import EVERYTHING, Figures, Share, make_shards
from opd_cache.stall import phase
from opd_cache.store.join import read_rollouts, score_fault
from opd_cache.store.plans import (
    RolloutPlan,
    first_token_to_score,
    load_rollout_plan,
    publish_score_plan,
    rollout_shards,
    score_shards,
    stage_command,
)
from opd_cache.store.publish import digest_file
from opd_cache.store.rows import group_limit, group_sizes, score_batch
from opd_cache.store.shards import ShardSet
from opd_cache.types import Int32Array, Rollout, Score

log = logging.getLogger(__name__)
FAULTS_SHOWN = 3  # in one error line
VALUES_PER_WINDOW = 1 << 26  # of a column, at full length: what a window of scores may hold in memory, 0.5 GiB


def new_scorer(run: Run, config: TeacherConfig) -> Scorer:
    """The scorer of a teacher, as `Run.teacher_config` gives it, without a model yet."""
    name = config.scorer or run.recipe.score.scorer
    return registry.load(registry.SCORERS, name, "score.scorer")(config, run.recipe.score)


def score_episode(run: Run, episode: int, teacher: str, scorer: Scorer, share: Share = EVERYTHING) -> bool:
    """Score an episode's missing shards with one teacher; True when the stage is sealed.

    Raises MissingInputError when the rollouts are not complete, MismatchError when the teacher was asked for
    something else before, ModelError when its vocabulary is another.
    """
    options = run.recipe.score
    target = run.dir.episode(episode)
    return score_rollouts(
        run, target, teacher, scorer, options.top_k, share, options.horizon, options.support == "student"
    )


def score_rollouts(
    run: Run,
    target: RolloutSet,
    teacher: str,
    scorer: Scorer,
    top_k: int,
    share: Share = EVERYTHING,
    horizon: int | None = None,
    on_student_support: bool = False,
) -> bool:
    """Make the missing score shards of one plan's rollouts, of the tokens up to `horizon` that have no score yet.

    on_student_support: of the student's top k that the rollouts hold, in place of the teacher's own.
    """
    if not target.plan.exists():
        raise MissingInputError(f"{target.path}: no rollouts yet. Run: {stage_command('rollout', target)}")
    plan = load_rollout_plan(target)
    if on_student_support and plan.sampling.student_top_k < top_k:
        raise MismatchError(
            f"{target.plan}: the rollouts hold the student's {plan.sampling.student_top_k} likeliest tokens, score.support = 'student' with score.top_k = {top_k} needs as many. Lower it, or sample with rollout.student_top_k={top_k} in another run_dir."
        )
    rollouts = rollout_shards(target, plan)
    seal = rollouts.open_seal()
    config = run.teacher_config(teacher, plan.policy_version)
    fingerprint = fingerprint_of(target, plan, teacher, scorer)
    if run.recipe.teachers[teacher].policy == "current" and fingerprint != plan.policy:
        raise MismatchError(
            f"{target.plan}: sampled by policy {plan.policy[:12]}, but policy version {plan.policy_version} of this run is {fingerprint[:12]}; teachers.{teacher}.model = 'policy:current' means the one that sampled. Name a model folder instead."
        )
    first_token = first_token_to_score(target, teacher, horizon)
    prompts = own_prompts(run, target, plan, teacher, config)
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
        "support": "student" if on_student_support else None,
    }
    publish_score_plan(target, plan, facts)
    scores = score_shards(target, plan, teacher, first_token)
    if share.of(scores.missing()):
        with phase(f"loading teacher {teacher}"):
            check_same_vocabulary(read_vocabulary(run.dir), config, teacher)
            _warn_of_other_eos(plan, teacher, config)
            run.check_teacher_policy(teacher, plan.policy_version)
            scorer.load()

    def make(shard: int, progress: StageProgress, figures: Figures) -> Iterator[pa.RecordBatch]:
        own_ids = {} if prompts is None else read_prompt_ids(prompts, plan.shard_prompts(shard))
        return _score_shard(plan, rollouts, scores, shard, own_ids, scorer, run.recipe.score, progress, figures)

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


def _warn_of_other_eos(plan: RolloutPlan, teacher: str, config: TeacherConfig) -> None:
    theirs = eos_ids(model_folder(config, with_weights=False))
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
    options: ScoreConfig,
    progress: StageProgress,
    figures: Figures,
) -> Iterator[pa.RecordBatch]:
    """Score window after window of whole prompt groups, row groups leaving in the order of the rollouts.

    own_ids: the teacher's own prompts by prompt_index; empty where it sees the student's.
    """
    about = scores.about
    values_per_row = plan.sampling.max_new_tokens * max(about["top_k"], 1)
    limit, most = group_limit(values_per_row), max(1, VALUES_PER_WINDOW // values_per_row)
    reader, first_token = read_rollouts(rollouts, shard), about.get("first_token") or 0
    canary: tuple[Rollout, Score] | None = None
    for window in group_sizes(
        plan.shard_rollouts(shard), plan.n_samples_per_prompt, max(limit, min(scorer.window, most))
    ):
        rows = list(islice(reader, window))
        scored = _score_window(rows, window, own_ids, scorer, about, progress)
        canary = canary or next(
            ((row, score) for row, score in zip(rows, scored, strict=True) if len(score.teacher_logprobs)), None
        )
        start = 0
        for size in group_sizes(window, plan.n_samples_per_prompt, limit):
            group = slice(start, start + size)
            figures.update(score_figures(rows[group], scored[group], first_token))
            yield score_batch(scored[group], scores.schema)
            start += size
    # The file gets its name only when this generator has ended well.
    check_gap(figures, options.max_gap, str(scores.path(shard)))
    if canary is not None:
        again = score_alone(canary[0], own_ids, scorer, about)
        check_repeats(canary[1], again, scorer.dtype, str(scores.path(shard)))


def _score_window(
    rows: list[Rollout],
    expected: int,
    own_ids: Mapping[int, Int32Array],
    scorer: Scorer,
    about: Mapping[str, Any],
    progress: StageProgress,
) -> list[Score]:
    found: dict[int, Score] = {}
    for scores in _scores(rows, own_ids, scorer, about):
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
        if fault := score_fault(row, score, about) or _support_fault(row, score, about):
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


def score_alone(
    row: Rollout, own_ids: Mapping[int, Int32Array], scorer: Scorer, about: Mapping[str, Any]
) -> TokenScores:
    """One row scored by itself, of the tokens that `about`, what its shards say of themselves, wants."""
    (scores,) = _scores([row], own_ids, scorer, about)
    return scores


def _scores(
    rows: list[Rollout], own_ids: Mapping[int, Int32Array], scorer: Scorer, about: Mapping[str, Any]
) -> Iterator[TokenScores]:
    """What the scorer gives, keyed by the row's place; where that is no scores, an error that names rollouts."""
    requests = [
        _request(key, row, own_ids.get(row.prompt_index, row.prompt_ids), about) for key, row in enumerate(rows)
    ]
    try:
        yield from scorer.score(requests, about["top_k"])
    except UnfitScoresError as error:
        first = "; ".join(
            f"{rows[key].rollout_id}: {fault}" for key, fault in islice(error.faults.items(), FAULTS_SHOWN)
        )
        more = "; ..." if len(error.faults) > FAULTS_SHOWN else ""
        # Exit status 2, not "try again": what is wrong twice in a row is wrong the third time, and a job script that
        # starts anew on 75 would ask for ever. Somebody has to look at the server.
        raise StoreError(
            f"{len(error.faults)} of {len(rows)} rollouts got no scores ({scorer.engine}): {first}{more}. Nothing was published."
        ) from error


def _request(key: int, row: Rollout, prompt_ids: Int32Array, about: Mapping[str, Any]) -> ScoreRequest:
    """The tokens of a response that are to be scored. Those before them stand behind the prompt."""
    first, horizon = about.get("first_token"), about.get("horizon")
    support = _support_ids(row, about)
    if first is None:
        return ScoreRequest(key, prompt_ids, row.response_ids[:horizon], row.prompt_index, support)
    seen = np.concatenate([prompt_ids, row.response_ids[:first]])
    return ScoreRequest(key, seen, row.response_ids[first:horizon], group=key, support_ids=support)


def _support_ids(row: Rollout, about: Mapping[str, Any]) -> Int32Array | None:
    """The student's likeliest tokens where the teacher is asked for them."""
    if about.get("support") != "student":
        return None
    assert row.topk_ids is not None, "the plan says that they are cached"
    return row.topk_ids[about.get("first_token") : about.get("horizon"), : about["top_k"]]


def _support_fault(row: Rollout, score: Score, about: Mapping[str, Any]) -> str | None:
    support = _support_ids(row, about)
    if support is None or score.error is not None or np.array_equal(score.topk_ids, support):
        return None
    return "topk_ids are not the student's"
