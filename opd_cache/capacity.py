"""Whether a run can fit, asked before it is begun: disk, contexts, vocabularies, memory.

What is certain to fail is refused with its numbers; what is only likely to is warned of.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_cache.config import ModelConfig, Recipe, TeacherConfig
from opd_cache.errors import ConfigError, ModelError
from opd_cache.estimate import (
    ModelSize,
    Part,
    disk_parts,
    learning_bytes,
    model_size,
    sampling_bytes,
    scoring_bytes,
)
from opd_cache.fingerprint import context_length, model_folder, num_embeddings
from opd_cache.prompts.intake import prompt_lengths
from opd_cache.run import Run, open_run
from opd_cache.run_dir import RunDir

log = logging.getLogger(__name__)
ALL_STAGES = ("rollout", "score", "learn")


@dataclass(frozen=True)
class Memory:
    """What one stage will take of a device."""

    stage: str
    bytes: int
    free: int
    of: str  # memory, or which GPU's
    lower: str  # the key that makes it smaller


def open_fitting_run(recipe: Recipe, stages: Sequence[str], runs_here: bool = True) -> Run:
    """open_run, between checks that these stages of it can fit. runs_here: on this machine, whose memory counts.

    Raises ConfigError with the numbers when they cannot, before anything is written where the disk is too small.
    """
    run_dir = RunDir(Path(recipe.run_dir))
    if not run_dir.run_json.exists():
        check_space(recipe, refuses=True)
    run = open_run(recipe)
    check_space(recipe, refuses=False)
    if all(run.has_policy(episode + 1) for episode in range(recipe.num_episodes)):
        return run
    for warning in check_models(run, stages):
        log.warning("limits  %s", warning)
    for memory in memory_needed(run, stages) if runs_here else ():
        if memory.bytes > memory.free:
            log.warning("limits  %s", memory_warning(memory))
    return run


def space(recipe: Recipe) -> tuple[list[Part], int]:
    """What the run still writes, and the bytes that are free where it lies."""
    run = RunDir(Path(recipe.run_dir))
    student = Path(recipe.student.model)
    parts = disk_parts(recipe, run, model_size(student) if (student / "config.json").is_file() else None)
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    found = os.statvfs(there)
    return parts, found.f_bavail * found.f_frsize


def check_space(recipe: Recipe, refuses: bool) -> None:
    """Compare what the run still writes with the free space. refuses: where even the least does not fit, raise
    ConfigError; a run that is under way ends by itself when the disk is full, and goes on when there is room."""
    parts, free = space(recipe)
    least, expected = (sum(getattr(part, key) for part in parts) for key in ("least", "expected"))
    if expected <= free:
        return
    largest = max(parts, key=lambda part: part.expected)
    said = f"{recipe.run_dir}: the run writes {{}} more, {gigabytes(free)} are free there; most of it is {largest.name}: {largest.how}. Make room, choose another run_dir{_fewer(recipe, largest)}."
    if refuses and least > free:
        raise ConfigError(said.format(f"at least {gigabytes(least)}"))
    log.warning("limits  %s", said.format(f"about {gigabytes(expected)}"))


def _fewer(recipe: Recipe, largest: Part) -> str:
    is_open = largest.name == "policies" and recipe.learn.keep_policies.last is None
    return ", or keep fewer policies (learn.keep_policies.last=2)" if is_open else ""


def check_models(run: Run, stages: Sequence[str]) -> list[str]:
    """What does not go together of lengths, contexts and vocabularies, as warnings. Raises ConfigError where a stage is
    sure to end with an error."""
    recipe, student = run.recipe, model_folder(run.recipe.student)
    shortest, longest = prompt_lengths(run.dir.prompts)
    wanted = recipe.rollout.max_new_tokens
    warnings: list[str] = []
    if "rollout" in stages:
        limit = context_length(student) if recipe.rollout.sampler in ("hf", "vllm") else None
        if limit is not None and longest + wanted > limit:
            raise ConfigError(
                f"the longest prompt, {longest} tokens, and rollout.max_new_tokens = {wanted} exceed the student's context of {limit}. Lower it, or set prompts.max_prompt_tokens in another run_dir."
            )
        _check_top_k("rollout.student_top_k", recipe.rollout.student_top_k, "the student", num_embeddings(student))
    for name, teacher in _asked_teachers(recipe) if "score" in stages else ():
        warnings += _check_teacher(name, teacher, recipe, shortest, longest, num_embeddings(student))
    return warnings


def _asked_teachers(recipe: Recipe) -> Iterator[tuple[str, TeacherConfig]]:
    """Those with a model of their own."""
    for name in recipe.teachers_to_score():
        if recipe.teachers[name].policy is None:
            yield name, recipe.teachers[name]


def _check_teacher(
    name: str, teacher: TeacherConfig, recipe: Recipe, shortest: int, longest: int, student_ids: int
) -> Iterator[str]:
    try:
        folder = model_folder(teacher, with_weights=False)
        limit, ids = context_length(folder), num_embeddings(folder)
    except ModelError:
        return  # where it is needed, its stage says so
    wanted = recipe.rollout.max_new_tokens
    if recipe.score.support == "teacher":
        _check_top_k("score.top_k", recipe.score.top_k, f"teacher {name!r}", ids)
    if limit is not None and teacher.prompt.template is None:
        if shortest >= limit:
            raise ConfigError(
                f"the shortest prompt has {shortest} tokens, the context of teacher {name!r} is {limit}: it could score no response. Use another teacher, or shorter prompts."
            )
        if longest + min(wanted, recipe.score.horizon or wanted) > limit:
            yield f"the longest prompt, {longest} tokens, and rollout.max_new_tokens = {wanted} exceed the context of teacher {name!r}, {limit}: longer rows get an error instead of scores, and train nothing."
    if student_ids > ids:
        yield f"the student has {student_ids} token ids, teacher {name!r} has {ids}: responses with higher ids get an error instead of scores."


def _check_top_k(key: str, top_k: int, who: str, ids: int) -> None:
    if top_k > ids:
        raise ConfigError(f"{key} = {top_k}, but {who} has only {ids} tokens.")


def memory_needed(run: Run, stages: Sequence[str]) -> list[Memory]:
    """What the stages' models will take on this machine, of backends whose memory is known."""
    from opd_cache.models import free_memory, gpu_bytes

    recipe = run.recipe
    student, longest = model_size(model_folder(recipe.student)), prompt_lengths(run.dir.prompts)[1]
    found: list[tuple[str, int, str, str]] = []
    if student is not None and "rollout" in stages and recipe.rollout.sampler == "hf":
        size = sampling_bytes(recipe, student, longest, _bytes_a_value(recipe.student))
        found.append(("rollout", size, recipe.student.device, "rollout.batch_size"))
    for name, teacher in _asked_teachers(recipe) if "score" in stages else ():
        if (teacher.scorer or recipe.score.scorer) == "hf" and (its := _teacher_size(teacher)) is not None:
            size = scoring_bytes(its, _bytes_a_value(teacher), recipe.score.max_tokens_per_batch)
            found.append((f"score {name}", size, teacher.device, f"teachers.{name}.dtype"))
    if student is not None and "learn" in stages and recipe.learn.engine == "torch":
        size = learning_bytes(recipe.learn, student, gpu_bytes(recipe.student.device))
        found.append(("learn", size, recipe.student.device, "learn.max_tokens_per_micro_batch"))
    return [Memory(stage, size, *free_memory(device), key) for stage, size, device, key in found]


def _teacher_size(teacher: TeacherConfig) -> ModelSize | None:
    """Of one whose weights are here: nothing is fetched only to be measured."""
    folder = Path(teacher.model)
    return model_size(folder) if (folder / "config.json").is_file() else None


def _bytes_a_value(config: ModelConfig) -> int:
    from opd_cache.models import dtype_name

    return 4 if dtype_name(config) == "float32" else 2


def memory_warning(memory: Memory) -> str:
    return f"{memory.stage}: about {gigabytes(memory.bytes)} of {memory.of} are wanted, {gigabytes(memory.free)} are free; lower {memory.lower}, or use a larger machine"


def gigabytes(size: int) -> str:
    """For people: MB below 1 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
