"""What a teacher is asked with: whose weights, and its own prompts."""

from pathlib import Path

from opd_cache.config import TeacherConfig
from opd_cache.errors import TryAgainError
from opd_cache.fingerprint import model_folder, num_embeddings
from opd_cache.prompts.teacher_prompts import check_teacher_prompts, publish_teacher_prompts
from opd_cache.run import Run, check_same_vocabulary, load_tokenizer, read_vocabulary
from opd_cache.run_dir import PLAN, RolloutSet
from opd_cache.score.scores import Scorer
from opd_cache.store.plans import RolloutPlan, score_shards
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
