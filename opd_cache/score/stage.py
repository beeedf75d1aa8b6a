"""The score stage: for every missing shard, give each rollout its teacher's log-probs and publish them beside it."""

import logging
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa

from opd_cache import registry
from opd_cache.config import ScoreConfig
from opd_cache.errors import MissingInputError, StoreError, TryAgainError
from opd_cache.fingerprint import model_folder
from opd_cache.logs import StageProgress
from opd_cache.run import Run, check_same_vocabulary, eos_ids, read_vocabulary
from opd_cache.run_dir import PLAN, RolloutSet
from opd_cache.score.checks import GapWatch, check_repeats
from opd_cache.score.scores import Scorer, ScoreRequest, TokenScores, UnfitScoresError
from opd_cache.stage import EVERYTHING, Share, make_shards
from opd_cache.store.join import read_rollouts, score_fault
from opd_cache.store.plans import (
    RolloutPlan,
    load_rollout_plan,
    publish_score_plan,
    rollout_shards,
    score_shards,
    stage_command,
)
from opd_cache.store.publish import read_json
from opd_cache.store.rows import ROWS_PER_GROUP, ROWS_PER_GROUP_TOPK, group_sizes, score_batch
from opd_cache.store.shards import ShardSet
from opd_cache.types import Rollout, Score

log = logging.getLogger(__name__)
FAULTS_SHOWN = 3  # in one error line


def new_scorer(run: Run, teacher: str) -> Scorer:
    """The scorer of one of the recipe's teachers, without a model yet."""
    config = run.recipe.teachers[teacher]
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
    return score_rollouts(run, run.dir.episode(episode), teacher, scorer, run.recipe.score.top_k, share)


def score_rollouts(
    run: Run, target: RolloutSet, teacher: str, scorer: Scorer, top_k: int, share: Share = EVERYTHING
) -> bool:
    """Make the missing score shards of one plan's rollouts."""
    if not target.plan.exists():
        raise MissingInputError(f"{target.path}: no rollouts yet. Run: {stage_command('rollout', target)}")
    plan = load_rollout_plan(target)
    rollouts = rollout_shards(target, plan)
    config = run.recipe.teachers[teacher]
    facts = {
        "teacher": teacher,
        "teacher_fingerprint": _fingerprint(target, plan, teacher, scorer),
        "scorer": config.scorer or run.recipe.score.scorer,
        "dtype": scorer.dtype,
        "top_k": top_k,
        "rollouts": rollouts.open_seal(),
    }
    publish_score_plan(target, plan, facts)
    scores = score_shards(target, plan, teacher)
    if share.of(scores.missing()):
        check_same_vocabulary(read_vocabulary(run.dir), config, teacher)
        _warn_of_other_eos(run, plan, teacher)
        scorer.load()

    def make(shard: int, progress: StageProgress) -> Iterator[pa.RecordBatch]:
        return _score_shard(plan, rollouts, scores, shard, scorer, run.recipe.score, top_k, progress)

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


def _fingerprint(target: RolloutSet, plan: RolloutPlan, teacher: str, scorer: Scorer) -> str:
    """Which weights score. A teacher that cannot be asked now is waited for only where something is still to score."""
    try:
        return scorer.fingerprint()
    except TryAgainError:
        path = target.scores(teacher) / PLAN
        if path.exists() and not score_shards(target, plan, teacher).missing():
            return str(read_json(path)["teacher_fingerprint"])
        scorer.load()
        return scorer.fingerprint()


def _warn_of_other_eos(run: Run, plan: RolloutPlan, teacher: str) -> None:
    theirs = eos_ids(model_folder(run.recipe.teachers[teacher], with_weights=False))
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
    scorer: Scorer,
    options: ScoreConfig,
    top_k: int,
    progress: StageProgress,
) -> Iterator[pa.RecordBatch]:
    """Score window after window of whole prompt groups, row groups leaving in the order of the rollouts."""
    limit = ROWS_PER_GROUP_TOPK if top_k else ROWS_PER_GROUP
    reader, gaps = read_rollouts(rollouts, shard), GapWatch(options.max_gap)
    canary: tuple[Rollout, Score] | None = None
    for window in group_sizes(plan.shard_rollouts(shard), plan.n_samples_per_prompt, max(limit, scorer.window)):
        rows = list(islice(reader, window))
        scored = _score_window(rows, window, scorer, top_k, progress)
        for row, score in zip(rows, scored, strict=True):
            gaps.add(row, score)
        canary = canary or next(
            ((row, score) for row, score in zip(rows, scored, strict=True) if len(score.teacher_logprobs)), None
        )
        start = 0
        for size in group_sizes(window, plan.n_samples_per_prompt, limit):
            yield score_batch(scored[start : start + size], scores.schema)
            start += size
    # The file gets its name only when this generator has ended well.
    gaps.check(str(scores.path(shard)))
    if canary is not None:
        (again,) = _scores([canary[0]], scorer, top_k)
        check_repeats(canary[1], again, scorer.dtype, str(scores.path(shard)))


def _score_window(
    rows: list[Rollout], expected: int, scorer: Scorer, top_k: int, progress: StageProgress
) -> list[Score]:
    found: dict[int, Score] = {}
    for scores in _scores(rows, scorer, top_k):
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
        if fault := score_fault(row, score, top_k):
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


def _scores(rows: list[Rollout], scorer: Scorer, top_k: int) -> Iterator[TokenScores]:
    """What the scorer gives, keyed by the row's place; where that is no scores, an error that names rollouts."""
    requests = [ScoreRequest(key, row.prompt_ids, row.response_ids, row.prompt_index) for key, row in enumerate(rows)]
    try:
        yield from scorer.score(requests, top_k)
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
