"""Which files of a run may be queried: those that a seal lists. No Parquet is opened here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_cache.errors import MismatchError
from opd_cache.garbage import no_garbage_collection
from opd_cache.run_dir import PLAN, SEAL, RolloutSet, RunDir, shard_name
from opd_cache.status import asked_teachers, evaluated_subjects, read_identity, scored_parts
from opd_cache.store.publish import digest_file, read_json

MODES = ("greedy", "sampled")
JOINED = frozenset({"samples", "tokens"})


@dataclass(frozen=True)
class StageFiles:
    """The shards of one stage in one folder that may be queried."""

    stage: str  # rollout or score
    folder: Path
    log_name: str
    episode: int | None  # None for an evaluation
    teacher: str | None
    first_token: int
    names: list[str]  # of the shards' files
    facts: dict[str, Any]  # the seal, else the plan
    is_sealed: bool

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in self.names]


@dataclass(frozen=True)
class LeftOut:
    """Something that is there but not sealed, in words, and the views that would hold it."""

    text: str
    views: frozenset[str]


@dataclass
class RunFiles:
    """What of a run may be queried."""

    dir: RunDir
    rollouts: list[StageFiles] = field(default_factory=list)
    scores: list[StageFiles] = field(default_factory=list)
    evaluations: list[StageFiles] = field(default_factory=list)  # rollouts and scores of evaluations
    teacher_prompts: dict[str, Path] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def subjects(self) -> list[str]:
        """Every evaluated `policy=N` and `teacher=NAME`; a summary is published after its results."""
        return evaluated_subjects(self.dir)


@no_garbage_collection()
def find_files(run: RunDir, partial: bool = False) -> RunFiles:
    """The sealed files of a run; with `partial`, also the published shards of stages without a seal.

    Raises MissingInputError when there is no run, MismatchError when another version wrote it or scores were made from
    other rollouts.
    """
    read_identity(run)
    found = RunFiles(run)
    for episode in run.episodes():
        target = run.episode(episode)
        _add(found, found.rollouts, _stage_files(target, episode), partial)
        for teacher in asked_teachers(target):
            for first in scored_parts(target, teacher):
                scores = _stage_files(target, episode, teacher, first)
                _check_inputs(scores, target)
                _add(found, found.scores, scores, partial)
            _add_teacher_prompts(found, target, teacher)
        if (target.rollouts / SEAL).exists() and not asked_teachers(target):
            found.left_out.append(LeftOut(f"{target.label}: no scores yet, so no samples and no tokens", JOINED))
    for subject in found.subjects:
        for mode in MODES:
            target = run.evaluation_set(subject, mode)
            stages = [_stage_files(target), *(_stage_files(target, None, name) for name in asked_teachers(target))]
            found.evaluations += [stage for stage in stages if stage.is_sealed]
    return found


def _stage_files(
    target: RolloutSet, episode: int | None = None, teacher: str | None = None, first_token: int = 0
) -> StageFiles:
    folder = target.rollouts if teacher is None else target.scores(teacher, first_token)
    stage, seal = "rollout" if teacher is None else "score", folder / SEAL
    if seal.exists():
        facts = read_json(seal)
        names = [entry["file"] for entry in facts["shards"]]
    else:
        facts = _plan_of(target.plan if teacher is None else folder / PLAN)
        names = _published(folder, _plan_of(target.plan))
    return StageFiles(stage, folder, target.log_name, episode, teacher, first_token, names, facts, seal.exists())


def _plan_of(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _published(folder: Path, plan: dict[str, Any]) -> list[str]:
    """The shards of a plan that have a file, by the names that the plan gives them."""
    count = num_shards(plan)
    return [name for shard in range(count) if (folder / (name := shard_name(shard, count))).exists()]


def num_shards(plan: dict[str, Any]) -> int:
    """Of the rollouts' plan; 0 where there is none."""
    return -(-len(plan["prompt_indices"]) // plan["prompts_per_shard"]) if plan else 0


def _check_inputs(scores: StageFiles, target: RolloutSet) -> None:
    """Refuse sealed scores of other rollouts than those beside them: joined by name they would look like these."""
    seal = target.rollouts / SEAL
    if scores.is_sealed and seal.exists() and scores.facts["rollouts"] != digest_file(seal):
        raise MismatchError(
            f"{scores.folder / SEAL}: made from rollouts {scores.facts['rollouts'][:12]}, the seal beside it is {digest_file(seal)[:12]}. Move {scores.folder} away and run: opd-cache score RECIPE --episode {scores.episode}"
        )


def _add(found: RunFiles, stages: list[StageFiles], stage: StageFiles, partial: bool) -> None:
    if stage.is_sealed or (partial and stage.names):
        stages.append(stage)
    if not stage.is_sealed:
        view = "rollouts" if stage.teacher is None else "scores"
        found.left_out.append(LeftOut(_said(found, stage, partial), JOINED | {view, "shards"}))


def _said(found: RunFiles, stage: StageFiles, partial: bool) -> str:
    target = found.dir.episode(stage.episode or 0)
    what = "rollouts" if stage.teacher is None else f"scores of {stage.teacher}"
    if stage.first_token:
        what += f" from token {stage.first_token}"
    published = f"{len(stage.names)} of {num_shards(_plan_of(target.plan))} shards published"
    if partial:
        return f"{target.label}: {what} not sealed, {published}"
    hint = "; --partial includes the published shards" if stage.names else ""
    return f"{target.label}: {what} not sealed ({published}), left out{hint}"


def _add_teacher_prompts(found: RunFiles, target: RolloutSet, teacher: str) -> None:
    plan = read_json(target.scores(teacher) / PLAN)
    if plan.get("teacher_prompts") is not None and target.teacher_prompts(teacher).exists():
        found.teacher_prompts[teacher] = target.teacher_prompts(teacher)
