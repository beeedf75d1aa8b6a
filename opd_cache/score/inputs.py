"""What a teacher is asked with: whose weights, which tokens are still to score, and its own prompts."""

from pathlib import Path

from opd_cache.config import TeacherConfig
from opd_cache.errors import MismatchError, MissingInputError, TryAgainError
from opd_cache.fingerprint import model_folder, num_embeddings
from opd_cache.prompts.teacher_prompts import check_teacher_prompts, publish_teacher_prompts
from opd_cache.run import Run, check_same_vocabulary, load_tokenizer, read_vocabulary
from opd_cache.run_dir import PLAN, SEAL, RolloutSet
from opd_cache.score.scores import Scorer
from opd_cache.status import scored_parts
from opd_cache.store.plans import RolloutPlan, score_shards, stage_command
from opd_cache.store.publish import read_json


def fingerprint_of(target: RolloutSet, plan: RolloutPlan, teacher: str, scorer: Scorer) -> str:
    """Which weights score. A teacher that cannot be asked now is waited for only where something is still to score."""
    try:
        return scorer.fingerprint()
    except TryAgainError:
        path = target.scores(teacher) / PLAN
        if path.exists() and not score_shards(target, plan, teacher).missing():
            return str(read_json(path)["teacher_fingerprint"])
        scorer.load()
        return scorer.fingerprint()


def first_token_to_score(target: RolloutSet, teacher: str, horizon: int | None) -> int:
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


def own_prompts(run: Run, target: RolloutSet, plan: RolloutPlan, teacher: str, config: TeacherConfig) -> Path | None:
    """The prompts as the teacher sees them, made on first use; None where it sees the student's ids."""
    if config.prompt.template is None:
        return None
    final = target.teacher_prompts(teacher)
    if not final.exists():
        check_same_vocabulary(read_vocabulary(run.dir), config, teacher)
        tokenizer, embeddings = load_tokenizer(config), num_embeddings(model_folder(config, with_weights=False))
        publish_teacher_prompts(teacher, config.prompt, tokenizer, embeddings, target.prompts, plan.prompts, final)
    check_teacher_prompts(teacher, config.prompt, plan.prompts, final)
    return final
